"""FLOPs by torch's own formulas, with ours for attention: torch takes the CPU's kernels for free and 2.11 knows no grouped heads."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

_aten = torch.ops.aten


def attention_flops(query, key, value) -> int:
    """FLOPs of softmax(Q K^T) V from shapes (B, heads, tokens, width): two products; a causal mask saves nothing here.

    Query heads may share key heads (grouped-query attention), which torch 2.11's own `sdpa_flop_count` refuses; numbers are those of
    torch 2.14's.
    """
    scores = query[0] * query[1] * query[2] * key[2]
    return 2 * scores * (query[3] + value[3])


def attention_backward_flops(query, key, value) -> int:
    """FLOPs of the backward of `attention_flops`: five products, one of which makes the scores again."""
    scores = query[0] * query[1] * query[2] * key[2]
    return 2 * scores * (3 * query[3] + 2 * value[3])


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return attention_flops(query, key, value)


def _attention_backward(grad_out, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return attention_backward_flops(query, key, value)


CPU_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counter() -> FlopCounterMode:
    """`FlopCounterMode` that knows the CPU's attention kernels."""
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


def operator_flops(function: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """FLOPs of one call, 0 for operators that are no product."""
    packet = function._overloadpacket
    formula = _PRODUCTS.get(packet)
    if formula is not None:
        return formula(*args)
    if packet in CPU_ATTENTION:
        shapes = [a.shape if isinstance(a, torch.Tensor) else a for a in args]
        return CPU_ATTENTION[packet](*shapes)
    formula = flop_registry.get(packet)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


# torch's formulas walk over every argument and its nesting, which takes longer than the rest of a planned product.
_PRODUCTS = {
    _aten.mm: lambda a, b, *_: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    _aten.addmm: lambda c, a, b, *_: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    _aten.bmm: lambda a, b, *_: 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2],
    _aten.baddbmm: lambda c, a, b, *_: 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2],
}
