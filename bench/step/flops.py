"""FLOPs of a training step: executed ones, and the fewest that the real tokens need."""

from __future__ import annotations

from unittest import mock

import torch

from bench.step.models import freeze, load, pairs
from train.plan.flops import counter


def fewest(folder: str, count: int, frozen: bool, positions: str | None = "sequential") -> dict:
    """FLOPs of one forward and one backward of every sample by itself: no padding, no head, nothing twice.

    Counted with fake tensors, once for each kind of sample. The chunks of a layer with state end with the sample, too.
    """
    with mock.patch("vlm2vec.backbones.qwen3_5.layout.STEP", 1):
        return _fewest(freeze(load(folder, positions), frozen), count)


def _fewest(model: torch.nn.Module, count: int) -> dict:
    from torch._subclasses import FakeTensorMode

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
