"""Numbers that break others, in plain torch: finite, and as near to float64 as eager is."""

import pytest
import torch

from contrastive_kernels import info_nce_value_and_grad, sigmoid_loss
from contrastive_kernels.reference import info_nce_reference, sigmoid_loss_reference
from tests.kernels.helpers import products
from tests.kernels.helpers.sampling import unit

N, D = 9, 8


@pytest.fixture(autouse=True, params=products.FLOAT32_WAYS)
def way(request, monkeypatch):
    products.force(monkeypatch, request.param)


def batch(case):
    generator = torch.Generator().manual_seed(0)
    query, target = (unit(N, D, generator=generator, dtype=torch.float32) for _ in range(2))
    options = {}
    if case == "opposite":  # every negative at cosine -1
        query = query[:1].expand(N, D).contiguous()
        target = -query
    elif case == "same":  # every cosine is 1
        target = query = query[:1].expand(N, D).contiguous()
    elif case == "zeros":
        query, target = query.clone(), target.clone()
        query[4], target[4], target[6] = 0, 0, 0
    elif case == "all zeros":
        query, target = torch.zeros(N, D), torch.zeros(N, D)
    elif case == "duplicates":
        query, target = query.clone(), target.clone()
        query[2:6], target[2:6] = query[1].clone(), target[1].clone()
    elif case == "unnormalised":
        query = query * 30
    elif case == "negatives masked":  # by id, by margin
        options = {"target_ids": torch.zeros(N, dtype=torch.int64)}
    elif case == "negatives beyond a margin":
        options = {"mask_margin": -2.0}
    elif case == "targets masked":
        options = {"target_mask": torch.zeros(N, dtype=torch.bool)}
    elif case == "rows ignored":
        options = {"positives": torch.full((N,), -100)}
    elif case == "no weight":
        options = {"weight": torch.zeros(N)}
    return query, target, options


CASES = (
    "random",
    "opposite",
    "same",
    "zeros",
    "all zeros",
    "duplicates",
    "unnormalised",
    "negatives masked",
    "negatives beyond a margin",
    "targets masked",
    "rows ignored",
    "no weight",
)
NOTHING_LEFT = ("negatives masked", "negatives beyond a margin", "targets masked", "rows ignored", "no weight")


@pytest.mark.parametrize("more", [{}, {"symmetric": True}, {"label_smoothing": 0.1}, {"normalize": True}], ids=str)
@pytest.mark.parametrize("temperature", [0.001, 0.01, 10.0])
@pytest.mark.parametrize("case", CASES)
def test_finite_and_as_near_as_eager(case, temperature, more):
    query, target, options = batch(case)
    options = {**options, **more, "temperature": temperature}
    result = info_nce_value_and_grad(query, target, return_stats=True, **options)
    assert all(x.isfinite().all() for x in (result.loss, result.d_query, result.d_target, *vars(result.stats).values()))
    found = []
    for dtype in (torch.float64, torch.float32):
        q, t = (x.detach().to(dtype, copy=True).requires_grad_() for x in (query, target))
        loss = info_nce_reference(q, t, **options)
        found.append((loss.detach(), *torch.autograd.grad(loss, (q, t))))
    scale = max(1.0, 1 / temperature) * max(1.0, float(query.norm(dim=1).max()))
    for what, got, true, eager in zip(("loss", "d query", "d target"), (result.loss, result.d_query, result.d_target), *found):
        allowed = 2 * (eager.double() - true).abs().max() + 1e-6 * scale
        assert (got.double() - true).abs().max() <= allowed, what
    if case in NOTHING_LEFT:
        assert float(result.loss) == 0 and not result.d_query.any() and not result.d_target.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_finite_in_low_precision(case, dtype):
    query, target, options = batch(case)
    for symmetric in (False, True):
        for grad_dtype in (None, torch.float32):
            result = info_nce_value_and_grad(
                query.to(dtype), target.to(dtype), grad_dtype=grad_dtype, temperature=0.001, symmetric=symmetric, **options
            )
            assert all(x.isfinite().all() for x in (result.loss, result.d_query, result.d_target))


@pytest.mark.parametrize("case", ["random", "same", "zeros", "all zeros", "duplicates", "targets masked", "no weight"])
@pytest.mark.parametrize("scale, bias", [(10.0, -10.0), (1000.0, 0.0), (1e-3, 80.0)])
def test_sigmoid_loss(case, scale, bias):
    query, target, options = batch(case)
    results = []
    for function, dtype in (
        (sigmoid_loss, torch.float32),
        (sigmoid_loss_reference, torch.float32),
        (sigmoid_loss_reference, torch.float64),
    ):
        tensors = [x.detach().to(dtype, copy=True).requires_grad_() for x in (query, target, torch.tensor(scale), torch.tensor(bias))]
        loss = function(*tensors[:2], scale=tensors[2], bias=tensors[3], normalize=True, **options)
        results.append((loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, tensors))))
    for ours, eager, true in zip(*results):
        assert ours.isfinite().all()
        # logits, and what the normalisation takes away of a gradient, are of the scale's size
        assert (ours - true).abs().max() <= 2 * (eager - true).abs().max() + 1e-6 * max(1.0, scale, float(true.abs().max()))
