"""Every public function under torch.compile(fullgraph=True); autocast and strided input."""

import pytest
import torch
import torch.distributed as dist

from contrastive_kernels import (
    InfoNCELoss,
    info_nce,
    info_nce_value_and_grad,
    last_token_pool,
    pooled_info_nce,
    sigmoid_loss,
    topk_similarity,
)
from contrastive_kernels.reference import info_nce_reference, topk_similarity_reference

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
    offsets, bias = torch.tensor([0, 3, 7, 9, 12, 20]), torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    learnt = InfoNCELoss(temperature=0.2, learnable_temperature=True, symmetric=True, normalize=True)
    masks = {"query_mask": torch.arange(N) != 1, "target_mask": torch.arange(M) != 3}
    return {
        "info_nce": (lambda q, t: info_nce(q, t, temperature=0.2, normalize=True), (query, target)),
        "info_nce with options": (
            lambda q, t, h, s: info_nce(
                q,
                t,
                hard_negatives=h,
                temperature=s,
                target_ids=ids,
                weight=weight,
                label_smoothing=0.1,
                hardness=1.0,
                mask_margin=0.3,
                query_negatives=True,
                matryoshka_dims=(4, D),
            ),
            (query, target, hard, temperature),
        ),
        "info_nce none": (lambda q, t: info_nce(q, t, temperature=0.2, reduction="none", weight=weight).square().sum(), (query, target)),
        "info_nce statistics": (lambda q, t: info_nce(q, t, temperature=0.2, return_stats=True)[0], (query, target)),
        "InfoNCELoss": (lambda q, t, log_temperature: learnt(q, t), (query, target, learnt.log_temperature)),
        "InfoNCELoss constant": (InfoNCELoss(temperature=0.3, matryoshka_dims=(4, D), matryoshka_weights=(0.5, 1.0)), (query, target)),
        "pooled_info_nce": (
            lambda q, t: pooled_info_nce(q, t, query_attention_mask=mask, target_attention_mask=mask),
            (query_hidden, target_hidden),
        ),
        "pooled_info_nce packed": (
            lambda q, t: pooled_info_nce(q.flatten(0, 1), t, query_cu_seqlens=offsets, target_attention_mask=mask),
            (query_hidden, target_hidden),
        ),
        "last_token_pool": (lambda h: last_token_pool(h, attention_mask=mask).sin().sum(), (query_hidden,)),
        "last_token_pool packed": (
            lambda h: last_token_pool(h.flatten(0, 1), cu_seqlens=offsets, validate=True).sin().sum(),
            (query_hidden,),
        ),
        "last_token_pool as it is": (lambda h: last_token_pool(h, attention_mask=mask, normalize=False).sin().sum(), (query_hidden,)),
        "sigmoid_loss": (lambda q, t, s: sigmoid_loss(q, t, scale=s, bias=-1.0, target_ids=ids), (query, target, temperature)),
        "sigmoid_loss with options": (
            lambda q, t, s, b: sigmoid_loss(
                q, t, scale=s, bias=b, query_ids=torch.arange(N), target_ids=ids, weight=weight, normalize=True, validate=True, **masks
            ),
            (query, target, temperature, bias),
        ),
        "sigmoid_loss none": (lambda q, t: sigmoid_loss(q, t, scale=2.0, bias=-1.0, reduction="none").square().sum(), (query, target)),
    }


@pytest.mark.parametrize("name", functions())
def test_compiled_equals_eager(name):
    torch.compiler.reset()
    function, leaves = functions()[name]
    eager = function(*leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    assert all(leaf.requires_grad for leaf in leaves)
    for ours, theirs in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_compiled_over_a_group(group, exchange):
    """Shapes are compared between ranks, which is a collective and a look at numbers: inside the operator."""
    torch.compiler.reset()
    for function in (
        lambda q, t, **o: info_nce(q, t, temperature=0.2, **o),
        lambda q, t, **o: sigmoid_loss(q, t, scale=3.0, bias=-1.0, **o),
    ):
        leaves = leaf(N, D), leaf(M, D)
        alone = function(*leaves)
        compiled = torch.compile(lambda q, t: function(q, t, group=group, exchange=exchange), fullgraph=True, backend="aot_eager")(*leaves)
        torch.testing.assert_close(compiled, alone)
        for ours, theirs in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(alone, leaves)):
            torch.testing.assert_close(ours, theirs)


def test_compiled_search_and_value_and_grad():
    torch.compiler.reset()
    query, target = torch.randn(6, D), torch.randn(42, D)
    exclude = torch.randint(-1, 40, (6, 3))
    found = torch.compile(lambda q, t: topk_similarity(q, t, 5, exclude=exclude, validate=True), fullgraph=True, backend="aot_eager")(
        query, target
    )
    for ours, truth in zip(found, topk_similarity_reference(query, target, 5, exclude=exclude)):
        torch.testing.assert_close(ours, truth)
    found = torch.compile(lambda q, t: topk_similarity(q, t, 3), fullgraph=True, backend="aot_eager")(query, target)
    for ours, truth in zip(found, topk_similarity_reference(query, target, 3)):
        torch.testing.assert_close(ours, truth)
    result = torch.compile(lambda q, t: info_nce_value_and_grad(q, t).d_query, fullgraph=True, backend="aot_eager")(query, target)
    torch.testing.assert_close(result, info_nce_value_and_grad(query, target).d_query)


def test_autocast_gives_float32_losses():
    linear = torch.nn.Linear(D, 16)
    raw_query, raw_target = torch.randn(N, D), torch.randn(M, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query, target = linear(raw_query), linear(raw_target)
        assert query.dtype == torch.bfloat16
        losses = [
            info_nce(query, target, temperature=0.1, normalize=True),
            info_nce(query, raw_target.new_ones(M, 16), temperature=0.1),
            sigmoid_loss(query, target, scale=10.0, bias=-10.0, normalize=True),
        ]
        truth = info_nce_reference(query.double(), target.double(), temperature=0.1, normalize=True)
        scores, _ = topk_similarity(query, target, 2)
    assert all(loss.dtype == torch.float32 for loss in losses) and scores.dtype == torch.float32
    # the logits come from the bfloat16 embeddings as they are, not from products rounded to bfloat16
    torch.testing.assert_close(losses[0].double(), truth, rtol=2e-6, atol=0)
    losses[0].backward()
    assert linear.weight.grad.dtype == torch.float32 and linear.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: torch.cat([x, x])[: len(x)],
        lambda x: x.flip(0).flip(0),
    ],
)
def test_strided_input(make):
    query, target, hard = torch.randn(N, D), torch.randn(M, D), torch.randn(N, 2, D)
    for options in ({}, {"normalize": True}, {"symmetric": True, "matryoshka_dims": (3, D)}):
        plain = info_nce_value_and_grad(query, target, temperature=0.3, hard_negatives=hard, **options)
        strided = info_nce_value_and_grad(make(query), make(target), temperature=0.3, hard_negatives=make(hard), **options)
        for name in ("loss", "d_query", "d_target", "d_hard_negatives"):
            torch.testing.assert_close(getattr(strided, name), getattr(plain, name), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        sigmoid_loss(make(query), make(target), scale=3.0, bias=-1.0), sigmoid_loss(query, target, scale=3.0, bias=-1.0)
    )
    for ours, theirs in zip(topk_similarity(make(query), make(target), 3), topk_similarity(query, target, 3)):
        torch.testing.assert_close(ours, theirs)
