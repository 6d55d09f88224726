"""Kernels of layers that carry a state from token to token: each that is here against plain torch, value and gradients, then time.

A kernel is judged by the check that a model makes before it uses one (`vlm2vec.backbones.qwen3_5.self_check`), on longer samples; one
that fails it is a complaint, since nothing else would tell a user why the model is slow.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from bench.gpu.check import Check
from bench.gpu.clock import percentiles
from vlm2vec.backbones.qwen3_5 import providers, self_check

# Qwen3.5-2B's and -4B's: (key heads, value heads, their widths), (channels of a convolution, tokens of its window)
SIZES = {"delta_rule": [(16, 16, 128, 128), (16, 32, 128, 128)], "convolution": [(6144, 4), (8192, 4)]}
DRY_SIZES = {"delta_rule": [(1, 2, 4, 4)], "convolution": [(6, 4)]}
LENGTHS = [1225, 1225, 900, 640, 300, 300, 256, 60, 41, 33, 17, 12, 9, 3, 1]
DRY_LENGTHS = [70, 5, 3]


def checks(machine):
    for kind, every in (DRY_SIZES if machine.dry else SIZES).items():
        for sizes in every:
            for provider in ("torch", *([providers.PACKAGES[kind]] if not machine.dry and find_spec(providers.PACKAGES[kind]) else [])):
                name = f"{provider}, {kind.replace('_', ' ')} {'x'.join(map(str, sizes))}"
                yield Check(
                    name, lambda kind=kind, sizes=sizes, plain=provider == "torch": compare(machine, kind, sizes, plain), seconds=300.0
                )


def compare(machine, kind: str, sizes: tuple[int, ...], plain: bool) -> dict:
    """Errors and times of a kernel, or of plain torch, which is held against itself in float32."""
    device, lengths = torch.device(machine.device), DRY_LENGTHS if machine.dry else LENGTHS
    dtype = torch.bfloat16
    said = self_check.wrong(kind, device, dtype, sizes, lengths, plain=plain)
    inputs, kernel, torchs = self_check.case(kind, device, sizes, lengths)
    low = self_check.lowered(kind, inputs, device, dtype)
    run = torchs if plain else kernel
    cotangent = torch.randn_like(run(*low))
    row = {"dtype": str(dtype)[6:], "tokens": sum(lengths)}
    row |= percentiles(machine.clock, lambda: self_check.gradients(run, low, cotangent), 10 if not machine.dry else 2)
    return row | ({} if said is None else {"wrong": said})
