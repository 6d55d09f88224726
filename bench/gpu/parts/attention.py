"""Packed attention: every provider that is here against SDPA and a float32 truth, forward and gradients, then time.

An error may be twice that of the SDPA provider in the same type, plus one unit in the last place. A provider that raises is a
complaint: `attn="auto"` may choose it. Behind them, the kernels of layers that carry a state in its place (`bench.gpu.stateful`).
"""

from __future__ import annotations

import dataclasses

import torch

from bench.gpu import stateful
from bench.gpu.check import Check
from bench.gpu.clock import percentiles
from vlm2vec.attention import PROVIDERS, Segments, choose_provider, packed_attention

# (query heads, key heads, head width, causal, window): Qwen2-VL-2B's and -7B's decoders, its tower, Mistral's window
SHAPES = [(12, 2, 128, True, None), (28, 4, 128, True, None), (16, 16, 80, False, None), (32, 8, 128, True, 1024)]
LENGTHS = [1225, 1225, 900, 640, 300, 300, 256, 60, 41, 33, 17, 12, 9, 3, 1]


def checks(machine):
    for shape in SHAPES if not machine.dry else [(2, 1, 8, True, None)]:
        for provider in available():
            heads, key_heads, width, causal, window = shape
            name = f"{provider} {heads}/{key_heads}x{width}{' causal' if causal else ''}{f' window {window}' if window else ''}"
            yield Check(name, lambda provider=provider, shape=shape: compare(machine, provider, shape))
    yield from stateful.checks(machine)


def available() -> list[str]:
    """Providers that `attn=` takes on this machine."""
    found = []
    for provider in PROVIDERS:
        try:
            found.append(choose_provider(provider, torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16))
        except ValueError:  # not installed, or not for this card
            continue
    return found


def gradients(q, k, v, segments, cotangent, window):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = packed_attention(*leaves, segments, window=window)
    return (out.detach(), *torch.autograd.grad(out, leaves, cotangent))


def compare(machine, provider: str, shape) -> dict:
    heads, key_heads, width, causal, window = shape
    lengths, dtype = (LENGTHS, torch.bfloat16) if not machine.dry else ([5, 3], torch.float32)
    base = Segments.from_lengths(lengths, causal=causal).to(machine.device)
    q = torch.randn(base.total, heads, width, device=machine.device, dtype=dtype)
    k, v = (torch.randn(base.total, key_heads, width, device=machine.device, dtype=dtype) for _ in range(2))
    cotangent = torch.randn_like(q)
    wide = torch.float32 if dtype == torch.bfloat16 else torch.float64
    truth = gradients(*(x.to(wide) for x in (q, k, v)), base, cotangent.to(wide), window)
    plain = gradients(q, k, v, base, cotangent, window)
    allowed = [2 * (p.to(wide) - t).abs().max() + torch.finfo(dtype).eps * t.abs().max() for p, t in zip(plain, truth, strict=True)]
    segments = dataclasses.replace(base, provider=provider)
    got = gradients(q, k, v, segments, cotangent, window)
    worst = max(float((g.to(wide) - t).abs().max() / a) for g, t, a in zip(got, truth, allowed, strict=True))
    row = {"value": worst, "unit": "of the allowed error", "dtype": str(dtype)[6:], "tokens": base.total}
    row |= percentiles(machine.clock, lambda: gradients(q, k, v, segments, cotangent, window), 10 if not machine.dry else 2)
    return row | ({} if worst <= 1 else {"wrong": f"its worst error is {worst:.2f} times what is allowed"})
