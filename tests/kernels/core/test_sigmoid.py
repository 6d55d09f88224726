"""The sigmoid loss against its dense definition in float64: value and gradients, single process and ranks, and what it refuses."""

import itertools

import pytest
import torch

from contrastive_kernels import sigmoid_loss
from contrastive_kernels.eager import sigmoid
from contrastive_kernels.reference import sigmoid_loss_reference
from tests.kernels.helpers import products
from tests.kernels.helpers.sampling import Case

N, M, D = 11, 22, 6


@pytest.fixture(autouse=True, params=products.WAYS)
def small_tiles(request, monkeypatch):
    products.force(monkeypatch, request.param)
    monkeypatch.setattr(sigmoid, "TILE_ROWS", 4)
    monkeypatch.setattr(sigmoid, "TILE_COLUMNS", 5)


def option(case, name):
    if name == "positives":
        positives = case.integers(0, case.m, case.n)
        positives[-1] = -100
        return {"positives": positives}
    if name == "query_ids":
        return {"query_ids": case.integers(-1, 5, case.n), "target_ids": case.integers(-1, 5, case.m)}
    return {
        "target_ids": lambda: {"target_ids": case.integers(-1, 5, case.m)},
        "query_mask": case._query_mask,
        "target_mask": case._target_mask,
        "weight": case._weight,
        "sum": case._sum,
        "none": case._none,
        "normalize": lambda: {"normalize": True},
    }[name]()


NAMES = ("positives", "target_ids", "query_ids", "query_mask", "target_mask", "weight", "sum", "none", "normalize")


def gradients(function, case, options, scale, bias, cotangent):
    leaves = [x.clone().requires_grad_() for x in (case.query, case.target, scale, bias)]
    loss = function(leaves[0], leaves[1], scale=leaves[2], bias=leaves[3], **options)
    found = torch.autograd.grad((loss * cotangent[: loss.numel()].view(loss.shape)).sum(), leaves)
    return loss.detach(), [torch.nan_to_num(g) for g in found]


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_every_set_of_options(size):
    for seed, names in enumerate(itertools.combinations(NAMES, size)):
        if {"sum", "none"} <= set(names) or {"positives", "query_ids"} <= set(names) or {"target_ids", "query_ids"} <= set(names):
            continue
        case = Case(seed, N, M, D)
        options = {k: v for name in names for k, v in option(case, name).items()}
        scale, bias = torch.tensor(9.0, dtype=torch.float64), torch.tensor(-6.5, dtype=torch.float64)
        cotangent = 0.5 + torch.rand(N, generator=case.generator, dtype=torch.float64)
        ours, mine = gradients(sigmoid_loss, case, options, scale, bias, cotangent)
        truth, expected = gradients(sigmoid_loss_reference, case, options, scale, bias, cotangent)
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12, msg=lambda m: f"{names}: {m}")
        for which, a, b in zip(("query", "target", "scale", "bias"), mine, expected):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m: f"{names} d {which}: {m}")


def test_gradcheck():
    case = Case(1, 3, 4, 5)
    leaves = [
        x.clone().requires_grad_() for x in (case.query[:3], case.target[:4], torch.tensor(3.0).double(), torch.tensor(-2.0).double())
    ]
    positives = torch.tensor([0, 3, 1])
    assert torch.autograd.gradcheck(lambda q, t, s, b: sigmoid_loss(q, t, scale=s, bias=b, positives=positives), leaves)


def test_large_logits_are_finite_and_exact():
    query = torch.eye(4, dtype=torch.float64)
    loss = sigmoid_loss(query, -query, scale=1000.0, bias=0.0)
    torch.testing.assert_close(loss, torch.tensor((1000 + 3 * torch.log(torch.tensor(2.0)).item()), dtype=torch.float64))


def test_a_second_derivative_raises():
    query = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(sigmoid_loss(query, query.detach(), scale=5.0, bias=0.0), query, create_graph=True)
