"""Distillation from embeddings against its dense definition in float64: value, every gradient, ranks' shares of rows, and hard cases."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from contrastive_kernels import distillation_loss
from contrastive_kernels.eager import sweep
from contrastive_kernels.eager.backend import EAGER
from contrastive_kernels.reference import distillation_loss_reference
from tests.kernels.core.test_refusals import GOOD, NAN, M, N, refused
from tests.kernels.helpers import products
from tests.kernels.helpers.peak_bytes import distillation_scratch

WIDTH, TEACHER_WIDTH = 12, 20
SHAPES = [(7, 7), (6, 18), (9, 4), (5, 8), (1, 1)]  # rows with targets of their own, and without
OPTIONS = [
    {},
    {"symmetric": True},
    {"normalize": True},
    {"normalize": True, "symmetric": True, "temperature": 1.0},
    {"temperature": 0.005, "reduction": "sum"},  # logits that need their row's maximum
    {"temperature": 0.005, "teacher_temperature": 0.003, "symmetric": True},
    {"weight": True, "reduction": "none"},
    {"weight": True, "symmetric": True},
    {"reduction": "none", "symmetric": True, "normalize": True},
    {"by_row": True},
    {"masks": True},
    {"masks": True, "symmetric": True, "normalize": True},
    {"masks": True, "reduction": "none", "temperature": 0.015},
    {"by_row": True, "symmetric": True, "normalize": True, "temperature": 0.01},
]
CASES = [
    pytest.param(n, m, options, id=f"{n}x{m}-{options}")
    for (n, m), options in itertools.product(SHAPES, OPTIONS)
    if n == m or not (options.get("symmetric") and (options.keys() & {"weight", "by_row"} or options.get("reduction") == "none"))  # refused
]


@pytest.fixture(params=products.WAYS)
def small_panels(request, monkeypatch):
    products.force(monkeypatch, request.param)
    monkeypatch.setattr(sweep, "TILE_COLUMNS", 5)
    monkeypatch.setattr(sweep, "PRODUCT_COLUMNS", 10)


def embeddings(n, m, seed=0, dtype=torch.float64, close=1.0, widths=(WIDTH, TEACHER_WIDTH)):
    """(query, target, teacher_query, teacher_target), unit rows; `close`: how near own targets lie to their queries."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for width in widths:
        query, target = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for rows in (n, m))
        if m == n:
            target = target + close * query
        out += [F.normalize(query, dim=1).to(dtype), F.normalize(target, dim=1).to(dtype)]
    return out


def masks_of(n, m):
    """Every third query is left out, and the second target."""
    return {"query_mask": torch.arange(n) % 3 != 2, "target_mask": torch.arange(m) != 1}


def value_and_gradients(function, matrices, *, weight=False, temperature=0.05, by_row=False, masks=False, **options):
    query, target, teacher_query, teacher_target = matrices
    query, target = query.clone().requires_grad_(), target.clone().requires_grad_()
    temperature = torch.tensor(temperature, dtype=query.dtype)
    temperature = (temperature * torch.linspace(1, 3, len(query), dtype=query.dtype) if by_row else temperature).requires_grad_()
    if masks:
        options |= masks_of(len(query), len(target))
    if weight:
        options["weight"] = torch.linspace(0, 2, len(query), dtype=query.dtype)
    loss = function(query, target, teacher_query, teacher_target, temperature=temperature, **options)
    cotangent = torch.linspace(1, 2, loss.numel(), dtype=query.dtype).view(loss.shape)
    return loss.detach(), *torch.autograd.grad((loss * cotangent).sum(), (query, target, temperature))


@pytest.mark.parametrize("workspace", [None, 0.012], ids=["one panel", "panels"])
@pytest.mark.parametrize("n, m, options", CASES)
def test_value_and_gradients(n, m, options, workspace, small_panels):
    matrices = embeddings(n, m)
    if options.get("normalize"):
        matrices = [x * torch.linspace(0.5, 3, len(x), dtype=x.dtype)[:, None] for x in matrices]
    ours = value_and_gradients(distillation_loss, matrices, workspace_mib=workspace, **options)
    truth = value_and_gradients(distillation_loss_reference, matrices, **options)
    for name, got, expected in zip(("loss", "d query", "d target", "d temperature"), ours, truth):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradcheck(symmetric):
    query, target, *teacher = embeddings(4, 4)
    leaves = [query.requires_grad_(), target.requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)]
    assert torch.autograd.gradcheck(
        lambda q, t, tau: distillation_loss(q, t, *teacher, temperature=tau, teacher_temperature=0.2, symmetric=symmetric), leaves
    )


def test_equal_models_have_no_loss_and_no_gradient():
    query, target, *_ = embeddings(6, 6)
    loss, d_query, d_target, _ = value_and_gradients(distillation_loss, (query, target, query, target), teacher_temperature=0.05)
    assert loss == 0 and d_query.abs().max() < 1e-14 and d_target.abs().max() < 1e-14


def eager(query, target, teacher_query, teacher_target, *, temperature, teacher_temperature):
    """As trainers write it."""
    student, teacher = query @ target.T / temperature, teacher_query @ teacher_target.T / teacher_temperature
    return F.kl_div(F.log_softmax(student, 1), F.log_softmax(teacher, 1), log_target=True, reduction="batchmean")


@pytest.mark.parametrize("way", products.FLOAT32_WAYS)
def test_errors_are_a_quarter_of_eager_ones(way, monkeypatch):
    """In the geometric mean over how sure both models are, for the loss and either gradient."""
    products.force(monkeypatch, way, small=False)
    ratios = []
    for close, temperature, seed in itertools.product((0.0, 0.5, 1.0, 2.0), (0.05, 0.1), range(4)):
        matrices = embeddings(192, 192, seed, torch.float32, close, widths=(128, 192))
        options = {"temperature": temperature, "teacher_temperature": temperature}
        truth, ours, theirs = (
            value_and_gradients(function, [x.to(dtype) for x in matrices], **options)[:3]
            for function, dtype in ((eager, torch.float64), (distillation_loss, torch.float32), (eager, torch.float32))
        )
        errors = [[float((x.double() - y).norm() / y.norm()) for x, y in zip(found, truth)] for found in (ours, theirs)]
        ratios.append([math.log(max(mine, 1e-12) / its) for mine, its in zip(*errors)])
    assert (torch.tensor(ratios).mean(0).exp() <= 0.25).all(), torch.tensor(ratios).mean(0).exp()


def test_scratch_stays_within_the_workspace():
    generator = torch.Generator().manual_seed(0)
    matrices = [F.normalize(torch.randn(2048, 64, generator=generator), dim=1) for _ in range(4)]
    got = distillation_scratch(matrices, EAGER, 8 << 20)
    assert 4 << 20 < got <= 8 << 20 < 2 * 2048 * 2048 * 4


@pytest.mark.parametrize("place", range(4))
def test_a_loss_that_saw_a_nan_is_nan(place):
    matrices = embeddings(5, 5, dtype=torch.float32)
    matrices[place][3, 2] = math.nan
    loss, *gradients = value_and_gradients(distillation_loss, matrices)
    assert math.isnan(loss) and all(bool(x.isnan().any()) for x in gradients)


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_masked_may_hold_anything(symmetric):
    matrices = embeddings(7, 7)
    spoiled = [x.clone() for x in matrices]
    spoiled[0][2], spoiled[2][5], spoiled[1][1], spoiled[3][1] = math.nan, math.inf, math.nan, math.nan
    found = [value_and_gradients(distillation_loss, x, masks=True, symmetric=symmetric) for x in (matrices, spoiled)]
    for clean, other in zip(*found):
        torch.testing.assert_close(other, clean, rtol=0, atol=0)
    assert not found[0][1][[2, 5]].any() and not found[0][2][1].any()


def test_a_cotangent_that_is_not_finite_passes_through():
    query, target, *teacher = embeddings(4, 4)
    loss = distillation_loss(query.requires_grad_(), target, *teacher, reduction="none")
    loss.backward(torch.tensor([1.0, math.inf, 1.0, 1.0], dtype=torch.float64))
    assert query.grad[0].isfinite().all() and not query.grad[1].isfinite().all()


@pytest.mark.parametrize(
    "dtype, teacher_dtype", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
)
def test_types_may_differ(dtype, teacher_dtype):
    matrices = [x.to(kind) for x, kind in zip(embeddings(8, 8), (dtype, dtype, teacher_dtype, teacher_dtype))]
    query, target = (x.clone().requires_grad_() for x in matrices[:2])
    loss = distillation_loss(query, target, *matrices[2:], temperature=0.1)
    loss.backward()
    truth, d_query, *_ = value_and_gradients(distillation_loss_reference, [x.double() for x in matrices], temperature=0.1)
    assert query.grad.dtype == dtype and loss.dtype == (torch.float64 if teacher_dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=0)
    rtol = torch.finfo(dtype).eps
    torch.testing.assert_close(query.grad.double(), d_query, rtol=rtol, atol=rtol * float(d_query.abs().max()))


TEACHER = {"teacher_query": torch.randn(N, 3), "teacher_target": torch.randn(M, 3)}
DISTILLATION = {
    "the teacher's widths": ({"teacher_target": torch.randn(M, 4)}, "teacher_query D=3 and teacher_target D=4"),
    "the teacher's rows": ({"teacher_query": torch.randn(N + 1, 3)}, f"teacher_query: expected {N} rows.*got {N + 1}"),
    "the teacher's kind": ({"teacher_target": torch.ones(M, 3).long()}, "teacher_target: expected a floating-point tensor"),
    "temperature": ({"temperature": 0.0}, "temperature: expected a number above 0"),
    "temperatures": ({"temperature": torch.ones(N + 1)}, "temperature: expected"),
    "the teacher's temperature": ({"teacher_temperature": -1.0}, "teacher_temperature: expected a number above 0"),
    "its temperature as a tensor": ({"teacher_temperature": torch.tensor(1.0)}, "teacher_temperature: expected a number, got a tensor"),
    "pairs": ({"symmetric": True, "reduction": "none"}, f"symmetric: expected as many targets as queries.*got {M} targets and {N} queries"),
    "weighted pairs": ({"symmetric": True, "weight": torch.ones(N)}, "symmetric: expected as many targets as queries"),
    "reduction": ({"reduction": "median"}, "reduction"),
    "weight with a gradient": ({"weight": torch.ones(N, requires_grad=True)}, "weight: expected a tensor without gradient"),
    "a number of weights": ({"weight": torch.ones(N + 1)}, "weight: expected shape"),
    "NaN weights": ({"weight": NAN}, "weight: expected finite"),
    "scratch": ({"workspace_mib": 0}, "workspace_mib: expected MiB above 0"),
    "scratch for a row": ({"workspace_mib": 1e-5}, "workspace_mib: expected room for one row"),
    "backend": ({"backend": "cuda"}, "backend"),
}


@pytest.mark.parametrize("name", DISTILLATION)
def test_refused(name):
    given, message = DISTILLATION[name]
    with refused(message):
        distillation_loss(**{**GOOD, **TEACHER, **given})
