"""The sweep with Triton kernels, held to the dense reference: value and every gradient, option by option."""

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels import info_nce, info_nce_value_and_grad
from contrastive_kernels.reference import info_nce_reference
from tests.kernels.helpers.paths import PATHS, force

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, M, D = 19, 57, 24
TRUTH = torch.float64 if DEVICE == "cpu" else torch.float32  # the interpreter takes float64


def unit(*shape, dtype=TRUTH):
    x = torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)
    return x.to(dtype).to(DEVICE).requires_grad_()


def ints(*shape, low=0, high=4):
    return torch.randint(low, high, shape, device=DEVICE)


def row_temperatures():
    return (0.05 + 0.2 * torch.rand(N, dtype=TRUTH, device=DEVICE)).requires_grad_()


OPTIONS = {
    "plain": lambda: {},
    "positives": lambda: dict(positives=torch.where(ints(N) == 0, -100, ints(N, high=M))),
    "symmetric": lambda: dict(symmetric=True),
    "symmetric, shared positives": lambda: dict(symmetric=True, positives=ints(N, high=5), query_ids=ints(N, low=-1)),
    "query and target negatives": lambda: dict(query_negatives=True, target_negatives=True, query_ids=ints(N, low=-1, high=9)),
    "ids": lambda: dict(target_ids=ints(M, low=-1)),
    "masks": lambda: dict(query_mask=ints(N) > 0, target_mask=ints(M) > 0),
    "margin": lambda: dict(mask_margin=0.05),
    "relative": lambda: dict(mask_relative=0.1, symmetric=True),
    "hardness": lambda: dict(hardness=5.0),
    "hard negatives": lambda: dict(hard_negatives=unit(N, 3, D), own_negatives_only=ints(N) == 0),
    "weight, sum": lambda: dict(weight=torch.rand(N, dtype=TRUTH, device=DEVICE), reduction="sum"),
    "none": lambda: dict(reduction="none"),
    "smoothing": lambda: dict(label_smoothing=0.1, target_mask=ints(M) > 0, own_negatives_only=ints(N) == 0),
    "normalize": lambda: dict(normalize=True),
    "matryoshka": lambda: dict(matryoshka_dims=(8, 24), matryoshka_weights=(0.5, 1.0)),
    "row temperatures": lambda: dict(temperature=row_temperatures()),
    "row temperatures, normalize, symmetric": lambda: dict(temperature=row_temperatures(), normalize=True, symmetric=True, mask_margin=0.2),
    "row temperatures, all negatives": lambda: dict(
        temperature=row_temperatures(),
        normalize=True,
        query_negatives=True,
        target_negatives=True,
        hard_negatives=unit(N, 3, D),
        positives=torch.where(ints(N) == 0, -100, ints(N, high=M)),
        label_smoothing=0.1,
    ),
    "row temperatures, matryoshka": lambda: dict(temperature=row_temperatures(), matryoshka_dims=(8, 24)),
    "everything": lambda: dict(
        normalize=True,
        symmetric=True,
        query_negatives=True,
        target_negatives=True,
        target_ids=ints(M, low=-1, high=20),
        query_ids=ints(N, low=-1, high=20),
        target_mask=ints(M) > 0,
        mask_margin=0.3,
        hardness=2.0,
        weight=torch.rand(N, dtype=TRUTH, device=DEVICE),
    ),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, path, monkeypatch):
    force(monkeypatch, path)
    options = OPTIONS[name]()
    query, target = unit(N, D), unit(M, D)
    options.setdefault("temperature", torch.tensor(0.05, dtype=TRUTH, device=DEVICE, requires_grad=True))
    leaves = [query, target] + [v for v in options.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    # a workspace of a few rows: several panels, the last one short
    got = info_nce(query, target, backend="triton", workspace_mib=0.006, **options)
    truth = info_nce_reference(query, target, **options)
    tight = dict(rtol=1e-9, atol=1e-10) if TRUTH == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, truth, **tight)
    cotangent = torch.randn_like(truth)
    ours = torch.autograd.grad(got, leaves, cotangent)
    theirs = torch.autograd.grad(truth, leaves, cotangent)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, **tight)


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 under the interpreter")
@pytest.mark.parametrize("path", PATHS)
def test_gradcheck(path, monkeypatch):
    force(monkeypatch, path)
    query, target = unit(2, 3), unit(3, 3)
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, t, c: info_nce(q, t, temperature=c, backend="triton", positives=torch.tensor([2, 0])), (query, target, temperature)
    )


# 0.001: no fixed shift holds every row; 0.01: rows whose best cosine is low would underflow; 10: logits near 0
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the unsafe shift of the first launch, done again
@pytest.mark.parametrize("temperature", [0.001, 0.01, 10.0])
@pytest.mark.parametrize("case", ["random", "opposite", "same", "zero", "unnormalised"])
@pytest.mark.parametrize("path", ["exp", "fused"])
def test_hard_numbers(temperature, case, path, monkeypatch):
    force(monkeypatch, path)
    query, target = unit(9, 8, dtype=torch.float32).detach(), unit(9, 8, dtype=torch.float32).detach()
    if case == "opposite":  # every negative at cosine -1
        query = query[:1].expand(9, 8).contiguous()
        target = -query
    elif case == "same":
        target = query = query[:1].expand(9, 8).contiguous()
    elif case == "zero":
        query = query.clone()
        query[4] = 0
    elif case == "unnormalised":
        query = query * 3
    result = info_nce_value_and_grad(query, target, temperature=temperature, backend="triton", return_stats=True)
    q, t = query.double().requires_grad_(), target.double().requires_grad_()
    loss, stats = info_nce_reference(q, t, temperature=temperature, return_stats=True)
    loss.backward()
    scale = max(1.0, 1 / temperature)
    torch.testing.assert_close(result.loss.double(), loss.detach(), rtol=1e-5, atol=1e-6 * scale)
    assert result.d_query.isfinite().all() and result.d_target.isfinite().all()
    # a logit of 3,000 is rounded by 1e-4, and a probability by as much of itself
    rounding = 2 * torch.finfo(torch.float32).eps * float((q @ t.T).detach().abs().max()) / temperature
    for got, true in ((result.d_query, q.grad), (result.d_target, t.grad)):
        assert (got.double() - true).abs().max() <= rounding * true.abs().max() + 1e-5 * scale
    torch.testing.assert_close(result.stats.hardest_negative_cosine.double(), stats.hardest_negative_cosine.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_low_precision_gradients_beat_eager(dtype, normalize, path, monkeypatch):
    force(monkeypatch, path)
    query, target = unit(64, 32, dtype=dtype).detach(), unit(64, 32, dtype=dtype).detach()
    q, t = query.double().requires_grad_(), target.double().requires_grad_()
    info_nce_reference(q, t, temperature=0.05, normalize=normalize).backward()
    result = info_nce_value_and_grad(query, target, temperature=0.05, normalize=normalize, backend="triton", grad_dtype=torch.float32)
    eager_q, eager_t = query.clone().requires_grad_(), target.clone().requires_grad_()
    a, b = (torch.nn.functional.normalize(x, dim=1) if normalize else x for x in (eager_q, eager_t))
    torch.nn.functional.cross_entropy(a @ b.T / 0.05, torch.arange(64, device=DEVICE)).backward()
    for ours, eager, truth in ((result.d_query, eager_q.grad, q.grad), (result.d_target, eager_t.grad, t.grad)):
        error = ((ours.double() - truth).norm() / truth.norm()).item()
        assert error <= 0.5 * ((eager.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("path", PATHS)
def test_masked_rows_may_hold_nan(path, monkeypatch):
    force(monkeypatch, path)
    query, target = unit(9, 8).detach(), unit(9, 8).detach()
    keep = torch.arange(9, device=DEVICE) != 4
    clean = info_nce_value_and_grad(query, target, query_mask=keep, target_mask=keep, backend="triton")
    query[4], target[4] = float("nan"), float("nan")
    got = info_nce_value_and_grad(query, target, query_mask=keep, target_mask=keep, backend="triton")
    torch.testing.assert_close(got.loss, clean.loss)
    torch.testing.assert_close(got.d_query, clean.d_query)
    torch.testing.assert_close(got.d_target, clean.d_target)


@pytest.mark.parametrize("path", PATHS)
def test_results_repeat_bit_by_bit(path, monkeypatch):
    force(monkeypatch, path)
    query, target = unit(40, 16, dtype=torch.bfloat16).detach(), unit(70, 16, dtype=torch.bfloat16).detach()
    positives = ints(40)  # few targets for many rows: their gradients are scattered onto each other
    first, second = (info_nce_value_and_grad(query, target, positives=positives, backend="triton") for _ in range(2))
    assert torch.equal(first.d_query, second.d_query) and torch.equal(first.d_target, second.d_target)


# 1/72 is the coldest at which no row of unit vectors can leave the window of one fixed shift, 1/75 is beyond it
@pytest.mark.skipif(DEVICE != "cpu", reason="counts launches of float64")
@pytest.mark.parametrize("normalize, temperature, looks_again", [(True, 1 / 72, False), (True, 1 / 75, True), (False, 0.05, True)])
def test_rows_are_looked_at_again_only_where_they_may_be_unsafe(normalize, temperature, looks_again, monkeypatch):
    from contrastive_kernels.triton import launch_log

    force(monkeypatch, "exp")
    query = torch.cat([unit(8, 16).detach(), -unit(1, 16).detach().expand(4, 16)])
    target = torch.cat([query[-1:].expand(11, 16).neg(), query[:1]])  # the last rows see nothing but cosine -1
    with launch_log.record() as launches:
        got = info_nce_value_and_grad(query, target, normalize=normalize, temperature=temperature, backend="triton")
    assert any(launch.name == "exp_panel_redo" for launch in launches) == looks_again
    truth = info_nce_value_and_grad(query, target, normalize=normalize, temperature=temperature, backend="torch")
    torch.testing.assert_close(got.loss, truth.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.d_query, truth.d_query, rtol=1e-9, atol=1e-10)
