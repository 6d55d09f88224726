"""FLOPs of a training step: executed ones, and the fewest that the real tokens need."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def counter() -> FlopCounterMode:
    """`FlopCounterMode` that also knows the CPU's attention kernels, which it would take for free."""
    aten = torch.ops.aten

    def forward(query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad_out, query, key, value, *args, out_shape=None, **kwargs) -> int:
        return sdpa_backward_flop_count(grad_out, query, key, value)

    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


def fewest(folder: str, count: int, frozen: bool) -> dict:
    """FLOPs of one forward and one backward of every sample by itself: no padding, no head, nothing twice.

    Counted with fake tensors, once for each kind of sample.
    """
    from torch._subclasses import FakeTensorMode

    from bench.step_models import freeze, load, pairs

    model = freeze(load(folder, "sequential"), frozen)
    known: dict[tuple, int] = {}
    total = 0
    for features in model.preprocess([x for side in pairs(count) for x in side]):
        kind = (features.length, *features.vision.get("grid_thw", torch.empty(0)).flatten().tolist())
        if kind not in known:
            packed = model.pack([features])
            with FakeTensorMode(allow_non_fake_inputs=True), counter() as flops:
                model(packed).sum().backward()
            model.zero_grad(set_to_none=True)
            known[kind] = flops.get_total_flops()
        total += known[kind]
    return {"flops": total, "kinds": len(known)}
