"""FLOPs of attention by our formula, which knows grouped heads on every torch, against products that torch counts one by one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from train.plan.flops import attention_backward_flops, attention_flops, counter

# (query heads, key heads, queries, keys, width of queries and keys, width of values)
CASES = [
    (4, 4, 7, 7, 8, 8),  # as many key heads as query heads
    (4, 2, 7, 7, 8, 8),  # grouped heads, as in every Qwen: torch 2.11's own formula raises
    (6, 1, 5, 9, 16, 4),  # one key head for all, other lengths and widths for keys and values
]


@pytest.mark.parametrize("heads, key_heads, queries, keys, width, value_width", CASES)
def test_attention_is_counted_as_its_products_are(heads, key_heads, queries, keys, width, value_width):
    q, k, v = torch.randn(3, heads, queries, width), torch.randn(3, key_heads, keys, width), torch.randn(3, key_heads, keys, value_width)
    shapes = q.shape, k.shape, v.shape
    leaves = [x.requires_grad_() for x in (q, k.repeat_interleave(heads // key_heads, 1), v.repeat_interleave(heads // key_heads, 1))]
    with FlopCounterMode(display=False) as scores_product:
        scores = leaves[0] @ leaves[1].mT
    with FlopCounterMode(display=False) as values_product:
        out = scores.softmax(-1) @ leaves[2]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out.sum(), leaves)
    assert attention_flops(*shapes) == scores_product.get_total_flops() + values_product.get_total_flops()
    # flash attention keeps no scores: its backward makes them again
    assert attention_backward_flops(*shapes) == scores_product.get_total_flops() + backward.get_total_flops()
    if heads == key_heads:
        assert (attention_flops(*shapes), attention_backward_flops(*shapes)) == (
            sdpa_flop_count(*shapes),
            sdpa_backward_flop_count(out.shape, *shapes),
        )


def test_grouped_attention_of_a_cpu_is_counted():
    q, k = torch.randn(1, 4, 7, 8, requires_grad=True), torch.randn(1, 2, 7, 8, requires_grad=True)
    with counter() as counted:
        torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True).sum().backward()
    # the backward of torch's math path, where a version takes it, keeps the scores
    least = attention_flops(q.shape, k.shape, k.shape) + 4 * 2 * 4 * 7 * 7 * 8
    assert counted.get_total_flops() in (least, least + 2 * 4 * 7 * 7 * 8)


def test_a_delta_rule_is_counted_as_its_products_are():
    """Whole chunks that go on, as plain torch computes them; the triangular system, which torch does not count, as two products."""
    from train.plan.fake.delta_rule import delta_rule_flops
    from vlm2vec.backbones.qwen3_5.delta_rule import gated_delta_rule
    from vlm2vec.backbones.qwen3_5.layout import delta_layout

    chunks, heads, width, value_width = 5, 2, 8, 4

    def counted(chunks: int) -> int:
        tokens = 64 * chunks
        q, k, v = torch.randn(tokens, heads, width), torch.randn(tokens, heads, width), torch.randn(tokens, heads, value_width)
        gates = -torch.rand(tokens, heads), torch.rand(tokens, heads)
        with FlopCounterMode(display=False) as counter:
            gated_delta_rule(q, k, v, *gates, delta_layout([tokens], key_heads=heads, value_heads=heads))
        return counter.get_total_flops()

    system = 64 * heads * 2 * 64 * (width + value_width)
    assert counted(chunks) - counted(chunks - 1) + system == delta_rule_flops(64, heads, width, value_width)
