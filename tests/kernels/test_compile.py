"""Every public operator under torch.compile(fullgraph=True) and opcheck; autocast and strided input."""

import pytest
import torch
from sampling import Case, random_sets

from contrastive_kernels import InfoNCELoss, info_nce, info_nce_value_and_grad, last_token_pool, pooled_info_nce, sigmoid_loss, topk_similarity
from contrastive_kernels.info_nce_op import info_nce_op, pack
from contrastive_kernels.options import InfoNCEOptions
from contrastive_kernels.pooling import _pool, last_token_rows
from contrastive_kernels.reference import info_nce_reference, last_token_pool_reference, topk_similarity_reference
from contrastive_kernels.sigmoid_loss import _op as sigmoid_op
from contrastive_kernels.topk import _topk

N, M, D = 5, 10, 8


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def hidden_states():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    return leaf(N, 4, D), leaf(N, 4, D), mask


def functions():
    """Name: (function of leaves, the leaves)."""
    query, target, hard, temperature = leaf(N, D), leaf(M, D), leaf(N, 2, D), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    weight, ids = torch.rand(N, dtype=torch.float64), torch.arange(M) % 7
    query_hidden, target_hidden, mask = hidden_states()
    learnt = InfoNCELoss(temperature=0.2, learnable_temperature=True, symmetric=True, normalize=True)
    return {
        "info_nce": (lambda q, t: info_nce(q, t, temperature=0.2, normalize=True), (query, target)),
        "info_nce with options": (
            lambda q, t, h, s: info_nce(
                q, t, hard_negatives=h, temperature=s, target_ids=ids, weight=weight, label_smoothing=0.1, hardness=1.0, mask_margin=0.3,
                query_negatives=True, matryoshka_dims=(4, D),
            ),
            (query, target, hard, temperature),
        ),
        "info_nce none": (lambda q, t: info_nce(q, t, temperature=0.2, reduction="none", weight=weight).square().sum(), (query, target)),
        "info_nce statistics": (lambda q, t: info_nce(q, t, temperature=0.2, return_stats=True)[0], (query, target)),
        "InfoNCELoss": (learnt, (query, target)),
        "pooled_info_nce": (lambda q, t: pooled_info_nce(q, t, query_attention_mask=mask, target_attention_mask=mask), (query_hidden, target_hidden)),
        "pooled_info_nce packed": (
            lambda q, t: pooled_info_nce(q.flatten(0, 1), t, query_cu_seqlens=torch.tensor([0, 3, 7, 9, 12, 20]), target_attention_mask=mask),
            (query_hidden, target_hidden),
        ),
        "last_token_pool": (lambda h: last_token_pool(h, attention_mask=mask).square().sum(), (query_hidden,)),
        "sigmoid_loss": (lambda q, t, s: sigmoid_loss(q, t, scale=s, bias=-1.0, target_ids=ids), (query, target, temperature)),
        "sigmoid_loss none": (lambda q, t: sigmoid_loss(q, t, scale=2.0, bias=-1.0, reduction="none").square().sum(), (query, target)),
    }


@pytest.mark.parametrize("name", functions())
def test_compiled_equals_eager(name):
    torch.compiler.reset()
    function, leaves = functions()[name]
    eager = function(*leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    for ours, theirs in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_compiled_search_and_value_and_grad():
    torch.compiler.reset()
    query, target = torch.randn(6, D), torch.randn(40, D)
    found = torch.compile(lambda q, t: topk_similarity(q, t, 3), fullgraph=True, backend="aot_eager")(query, target)
    for ours, truth in zip(found, topk_similarity_reference(query, target, 3)):
        torch.testing.assert_close(ours, truth)
    result = torch.compile(lambda q, t: info_nce_value_and_grad(q, t).d_query, fullgraph=True, backend="aot_eager")(query, target)
    torch.testing.assert_close(result, info_nce_value_and_grad(query, target).d_query)


def test_opcheck_of_info_nce():
    seen = set()
    for seed, names in enumerate([(), ("symmetric", "packed_hard"), ("none", "weight"), *random_sets(6, seed=21)]):
        case = Case(seed)
        made = InfoNCEOptions.make({**case.options(names), "return_stats": bool(seed % 2)})
        hard = made.hard_negatives
        made = made if hard is None else made.replace(hard_negatives=hard.requires_grad_())
        arguments = pack(case.query.nan_to_num().requires_grad_(), case.target.nan_to_num().requires_grad_(), made, frozenset(("query", "target")) | (frozenset() if hard is None else {"hard_negatives"}))
        torch.library.opcheck(info_nce_op, arguments)
        seen |= set(names)
    assert len(seen) > 12


def test_opcheck_of_the_others():
    hidden, _, mask = hidden_states()
    for normalize in (True, False):
        torch.library.opcheck(_pool, (hidden, last_token_rows(hidden, mask), normalize, 1e-12, "torch"))
    torch.library.opcheck(_topk, (torch.randn(4, D), torch.randn(9, D), 3, torch.tensor([[1], [2], [-1], [0]]), 1 << 20, "torch"))
    torch.library.opcheck(_topk, (torch.randn(4, D), torch.randn(2, D), 3, None, 1 << 20, "torch"))
    scale, bias = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "none"):
        torch.library.opcheck(sigmoid_op, (leaf(N, D), leaf(M, D), scale, bias, None, None, None, None, None, None, True, -100, reduction, None, "gather", "0123"))


def test_autocast_gives_float32_losses():
    linear = torch.nn.Linear(D, 16)
    raw_query, raw_target = torch.randn(N, D), torch.randn(M, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query, target = linear(raw_query), linear(raw_target)
        assert query.dtype == torch.bfloat16
        losses = [
            info_nce(query, target, temperature=0.1, normalize=True), info_nce(query, raw_target.new_ones(M, 16), temperature=0.1),
            sigmoid_loss(query, target, scale=10.0, bias=-10.0, normalize=True),
        ]
        truth = info_nce_reference(query.double(), target.double(), temperature=0.1, normalize=True)
        scores, _ = topk_similarity(query, target, 2)
    assert all(loss.dtype == torch.float32 for loss in losses) and scores.dtype == torch.float32
    # the logits come from the bfloat16 embeddings as they are, not from products rounded to bfloat16
    torch.testing.assert_close(losses[0].double(), truth, rtol=2e-6, atol=0)
    losses[0].backward()
    assert linear.weight.grad.dtype == torch.float32 and linear.weight.grad.isfinite().all()


@pytest.mark.parametrize("make", [lambda x: x.transpose(0, -1).contiguous().transpose(0, -1), lambda x: torch.stack([x, x], -1)[..., 0], lambda x: torch.cat([x, x])[: len(x)], lambda x: x.flip(0).flip(0)])
def test_strided_input(make):
    query, target, hard = torch.randn(N, D), torch.randn(M, D), torch.randn(N, 2, D)
    for options in ({}, {"normalize": True}, {"symmetric": True, "matryoshka_dims": (3, D)}):
        plain = info_nce_value_and_grad(query, target, temperature=0.3, hard_negatives=hard, **options)
        strided = info_nce_value_and_grad(make(query), make(target), temperature=0.3, hard_negatives=make(hard), **options)
        for name in ("loss", "d_query", "d_target", "d_hard_negatives"):
            torch.testing.assert_close(getattr(strided, name), getattr(plain, name), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sigmoid_loss(make(query), make(target), scale=3.0, bias=-1.0), sigmoid_loss(query, target, scale=3.0, bias=-1.0))
    for ours, theirs in zip(topk_similarity(make(query), make(target), 3), topk_similarity(query, target, 3)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_pooling_equals_its_definition(normalize, strided):
    hidden, other, mask = hidden_states()
    hidden = hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() if strided else hidden
    results = [f(hidden, attention_mask=mask, normalize=normalize) for f in (last_token_pool, last_token_pool_reference)]
    torch.testing.assert_close(*results)
    cotangent = torch.randn(N, D, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(r, hidden, cotangent)[0] for r in results))
    packed, offsets = other.detach().flatten(0, 1).requires_grad_(), torch.tensor([0, 3, 7, 9, 12, 20])
    results = [f(packed, cu_seqlens=offsets, normalize=normalize) for f in (last_token_pool, last_token_pool_reference)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(r, packed, cotangent)[0] for r in results))


def test_pooled_loss_equals_pooling_then_loss():
    query, target, mask = hidden_states()
    ours = pooled_info_nce(query, target, query_attention_mask=mask, target_attention_mask=mask, symmetric=True, temperature=0.2)
    rows = [last_token_pool_reference(h, attention_mask=mask) for h in (query, target)]
    truth = info_nce_reference(*rows, symmetric=True, temperature=0.2)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(ours, (query, target)), torch.autograd.grad(truth, (query, target))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_samples_without_a_token_pool_to_zeros():
    hidden = torch.randn(2, 3, D, requires_grad=True)
    out = last_token_pool(hidden, attention_mask=torch.tensor([[0, 0, 0], [1, 1, 0]]))
    assert not out[0].any() and out[1].any()
    assert last_token_pool(hidden[0], cu_seqlens=torch.tensor([0, 0, 3]))[0].eq(0).all()
    out.sum().backward()
    assert not hidden.grad[0].any()
