"""Rows with hard negatives but no candidate in the batch, cold: the panel's shift and the row's own lie a thousand nats apart."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels import info_nce_value_and_grad
from contrastive_kernels.reference import info_nce_reference
from contrastive_kernels.triton import configs, symmetric
from contrastive_kernels.triton import matryoshka as levels
from tests.kernels.helpers.paths import PATHS, force

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 products of the interpreter; bench/gpu checks a GPU")
N, D = 9, 32
ALONE = {
    "ids": lambda: dict(target_ids=torch.zeros(N, dtype=torch.int64)),  # every target bears every positive's id
    "mask": lambda: dict(target_mask=torch.arange(N) == 3),  # row 3 has its positive and nothing else
    "own": lambda: dict(own_negatives_only=torch.arange(N) % 2 == 0),
}


def unit(*shape, dtype):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def check(dtype, temperature, **options):
    query, target = unit(N, D, dtype=dtype), unit(N, D, dtype=dtype)
    # from beside the query, whose logit is the greatest, to its opposite, whose logit lies 2 / temperature below
    share = torch.linspace(-1, 1, N)[:, None, None]
    hard = torch.nn.functional.normalize(share * query.double()[:, None] + 0.1 * unit(N, 2, D, dtype=torch.float64), dim=-1).to(dtype)
    got = info_nce_value_and_grad(
        query, target, hard_negatives=hard, temperature=temperature, backend="triton", grad_dtype=torch.float32, **options
    )
    q, t, h = (x.double().requires_grad_() for x in (query, target, hard))
    loss = info_nce_reference(q, t, hard_negatives=h, temperature=temperature, **options)
    value = loss.item()
    # a logit is rounded by some of float32's last digits, and a probability by as much of itself; exponentials by the type's
    near = 8 * torch.finfo(torch.float32).eps / temperature + 2 * torch.finfo(dtype).eps
    assert abs(got.loss.item() - value) <= near * max(1.0, value)
    for ours, right in zip((got.d_query, got.d_target, got.d_hard_negatives), torch.autograd.grad(loss, (q, t, h))):
        assert ours.isfinite().all()
        assert (ours.double() - right).norm() <= near * right.norm() + 1e-30  # less than that float32 need not hold


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the unsafe shift of the first launch, done again
@pytest.mark.parametrize("temperature", [0.01, 0.003, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alone", ALONE)
@pytest.mark.parametrize("path", PATHS)
def test_a_direction(path, alone, dtype, temperature, monkeypatch):
    force(monkeypatch, path, rows=4)
    check(dtype, temperature, **ALONE[alone]())


def taken(monkeypatch, owner, name, path):
    """`path` of the plans that owner.name makes, whatever the prices say."""
    make = getattr(owner, name)
    monkeypatch.setattr(
        owner,
        name,
        lambda *args: dataclasses.replace(plan := make(*args), chosen=next(w for w in plan.ways if w.path == path and not w.reason)),
    )


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("temperature", [0.01, 0.003, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alone", ALONE)
def test_levels(alone, dtype, temperature, monkeypatch):
    monkeypatch.setattr(configs, "exp_panel", lambda *a: configs.Tile(16, 16, 16, 4, 1, 2))
    taken(monkeypatch, levels, "plan", "levels")
    check(dtype, temperature, matryoshka_dims=(16, D), **ALONE[alone]())


# the coldest that one shift for both directions can take is 1 / 73
@pytest.mark.parametrize("temperature", [0.1, 0.0142])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_directions(dtype, temperature, monkeypatch):
    calls, joint = [], symmetric.joint
    taken(monkeypatch, symmetric, "decide", "joint")
    monkeypatch.setattr(symmetric, "joint", lambda *args: calls.append(1) or joint(*args))
    check(dtype, temperature, symmetric=True, **ALONE["ids"]())
    assert calls
