"""Every buffer that is made without being filled is full of NaN here: nothing may be read that was not written. And again, bit by bit."""

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels import info_nce_value_and_grad, last_token_pool, sigmoid_loss, topk_similarity
from contrastive_kernels.core import sigmoid
from contrastive_kernels.triton.backend import TRITON
from contrastive_kernels.triton.kernels import pool, topk
from tests.kernels.helpers.paths import PATHS, force

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter; bench/gpu repeats on a GPU")
N, M, D = 37, 74, 24  # ragged tiles on both sides


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    def poison(made):
        if made.is_floating_point():
            return made.fill_(float("nan"))
        return made.fill_(0x5A) if made.dtype == torch.uint8 else made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, original=original, **kwargs: poison(original(*args, **kwargs)))
    assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(2).isnan().all()


def unit(*shape, dtype=torch.bfloat16):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1).to(dtype)


def ints(*shape, low=0, high=4):
    return torch.randint(low, high, shape)


OPTIONS = {
    "plain": {},
    "symmetric, extra negatives": dict(symmetric=True, query_negatives=True, target_negatives=True),
    "nothing left": dict(target_mask=torch.arange(M) % 2 == 1, own_negatives_only=torch.arange(N) % 3 == 0, mask_margin=-2.0),
    "smoothing": dict(label_smoothing=0.1, positives=ints(N, high=M)),
}


def twice(run):
    first, second = run(), run()
    for name in ("loss", "d_query", "d_target", "d_temperature"):
        a, b = getattr(first, name), getattr(second, name)
        assert a.isfinite().all(), name
        assert torch.equal(a, b), name
    return first


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", OPTIONS)
def test_info_nce(name, path, monkeypatch):
    force(monkeypatch, path, rows=16)
    query, target, temperature = unit(N, D), unit(M, D), torch.tensor(0.05)
    twice(lambda: info_nce_value_and_grad(query, target, temperature=temperature, backend="triton", **OPTIONS[name]))


@pytest.mark.parametrize("options", [dict(symmetric=True, normalize=True), dict(matryoshka_dims=(64, 80))])
def test_one_panel_for_both_directions_and_one_sweep_for_levels(options, monkeypatch):
    query, target, temperature = unit(N, 80), unit(N, 80), torch.tensor(0.05)
    got = twice(lambda: info_nce_value_and_grad(query, target, temperature=temperature, backend="triton", **options))
    truth = info_nce_value_and_grad(query.double(), target.double(), temperature=temperature.double(), backend="torch", **options)
    assert (got.d_query.double() - truth.d_query).norm() <= 0.01 * truth.d_query.norm()


def test_the_others(monkeypatch):
    monkeypatch.setattr(sigmoid, "choose", lambda *a: TRITON)
    query, target = unit(N, D).requires_grad_(), unit(M, D).requires_grad_()
    loss = sigmoid_loss(query, target, scale=10.0, bias=-10.0, target_mask=torch.arange(M) % 2 == 0)
    assert all(x.isfinite().all() for x in (loss, *torch.autograd.grad(loss, (query, target))))
    scores, indices = topk_similarity(unit(5, 20), unit(90, 20), 7, backend="triton")
    assert scores.isfinite().all() and (indices >= 0).all() and (indices < 90).all()
    hidden = torch.randn(3, 4, 10, requires_grad=True)
    pooled = last_token_pool(hidden, attention_mask=torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]), backend="triton")
    assert pooled.isfinite().all() and torch.autograd.grad(pooled.sum(), hidden)[0].isfinite().all()


def test_search_and_pooling_repeat_bit_by_bit():
    query, target = torch.randint(-2, 3, (5, 20)).to(torch.bfloat16), torch.randint(-2, 3, (200, 20)).to(torch.bfloat16)  # full of ties
    hidden, index, cotangent = unit(12, 33), torch.tensor([3, 3, 0, -1, 11]), unit(5, 33)

    def run():
        pooled, inverse = pool.pool_forward(hidden, index)
        return *topk.topk(query, target, 7, splits=3), pooled, inverse, pool.pool_backward(cotangent, hidden, index, inverse)

    for first, second in zip(run(), run()):
        assert torch.equal(first, second) and not first.isnan().any()
