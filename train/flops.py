"""FLOPs by torch's own formulas, with those of the CPU's attention kernels, which torch would take for free."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad_out, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


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
