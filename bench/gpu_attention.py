"""Packed attention on CUDA: flash-attn and torch's varlen kernels against the SDPA provider and a float32 truth.

    python -m bench.gpu_attention [--repeat 20]        (also a part of `python -m bench gpu`)

Correctness first: a provider's error against float32 may be twice that of the SDPA provider in the same dtype, plus one unit in the
last place, forward and all three gradients. Then milliseconds forward plus backward, p50.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch

from vlm2vec.attention import PROVIDERS, Segments, _has_flash_attn, _has_varlen, packed_attention

# (query heads, key heads, head width, causal, window): Qwen2-VL-2B's and -7B's decoders, its tower, Mistral's window
SHAPES = [(12, 2, 128, True, None), (28, 4, 128, True, None), (16, 16, 80, False, None), (32, 8, 128, True, 1024)]
LENGTHS = [1225, 1225, 900, 640, 300, 300, 256, 60, 41, 33, 17, 12, 9, 3, 1]


def gradients(q, k, v, segments, cotangent, window):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = packed_attention(*leaves, segments, window=window)
    return (out.detach(), *torch.autograd.grad(out, leaves, cotangent))


def available() -> list[str]:
    have = {"sdpa": True, "flash_attn": _has_flash_attn(), "varlen": _has_varlen()}
    return [p for p in PROVIDERS if have[p]]


def compare(repeat: int = 20, dtype: torch.dtype = torch.bfloat16) -> list[dict]:
    """One row per shape and provider: worst error as a multiple of what is allowed, and milliseconds."""
    rows = []
    for heads, key_heads, width, causal, window in SHAPES:
        torch.manual_seed(0)
        base = Segments.from_lengths(LENGTHS, causal=causal).to("cuda")
        q = torch.randn(base.total, heads, width, device="cuda", dtype=dtype)
        k, v = (torch.randn(base.total, key_heads, width, device="cuda", dtype=dtype) for _ in range(2))
        cotangent = torch.randn_like(q)
        truth = gradients(q.float(), k.float(), v.float(), base, cotangent.float(), window)
        allowed = None
        for provider in available():
            segments = Segments(**{**vars(base), "provider": provider})
            got = gradients(q, k, v, segments, cotangent, window)
            errors = [(g.float() - t).abs().max() for g, t in zip(got, truth)]
            if provider == "sdpa":
                allowed = [2 * e + torch.finfo(dtype).eps * t.abs().max() for e, t in zip(errors, truth)]
            times = []
            for _ in range(repeat):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                gradients(q, k, v, segments, cotangent, window)
                stop.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(stop))
            rows.append({
                "heads": f"{heads}/{key_heads}x{width}", "causal": causal, "window": window, "provider": provider, "tokens": base.total,
                "error_of_allowed": round(max((e / a).item() for e, a in zip(errors, allowed)), 3), "p50_ms": round(statistics.median(times), 3),
            })  # fmt: skip
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("packed attention on a GPU: there is none here, nothing to compare", file=sys.stderr)
        return 2
    rows = compare(args.repeat)
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(map(str, row.values())))
    return int(any(r["error_of_allowed"] > 1 for r in rows))


if __name__ == "__main__":
    sys.exit(main())
