"""Packed attention on CUDA: flash-attn and torch's varlen kernels against the SDPA provider and a float32 truth.

    python -m bench.gpu_attention [--repeat 20]        (also a part of `python -m bench gpu`)

Correctness first: a provider's error against float32 may be twice that of the SDPA provider in the same dtype, plus one unit in the
last place, forward and all three gradients. Then milliseconds forward plus backward, p50.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time

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


def milliseconds(run, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def compare(repeat: int = 20, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", shapes=SHAPES, lengths=LENGTHS) -> list[dict]:
    """One row per shape and provider: worst error as a multiple of what is allowed, and milliseconds; a provider that fails, why."""
    rows = []
    for heads, key_heads, width, causal, window in shapes:
        torch.manual_seed(0)
        base = Segments.from_lengths(lengths, causal=causal).to(device)
        q = torch.randn(base.total, heads, width, device=device, dtype=dtype)
        k, v = (torch.randn(base.total, key_heads, width, device=device, dtype=dtype) for _ in range(2))
        cotangent = torch.randn_like(q)
        truth = gradients(q.float(), k.float(), v.float(), base, cotangent.float(), window)
        allowed = None
        for provider in available():
            row = {"heads": f"{heads}/{key_heads}x{width}", "causal": causal, "window": window, "provider": provider, "tokens": base.total, "error_of_allowed": 0.0, "p50_ms": "", "note": ""}
            rows.append(row)
            segments = dataclasses.replace(base, provider=provider)
            try:
                got = gradients(q, k, v, segments, cotangent, window)
                errors = [(g.float() - t).abs().max() for g, t in zip(got, truth)]
                if provider == "sdpa":
                    allowed = [2 * e + torch.finfo(dtype).eps * t.abs().max() for e, t in zip(errors, truth)]
                times = [milliseconds(lambda s=segments: gradients(q, k, v, s, cotangent, window), device) for _ in range(repeat)]
            except Exception as error:  # a library of another version
                row["note"] = f"{type(error).__name__}: {str(error)[:120]}"
                continue
            row["error_of_allowed"] = round(max((e / a).item() for e, a in zip(errors, allowed)), 3)
            row["p50_ms"] = round(statistics.median(times), 3)
    return rows


def table(rows: list[dict]) -> str:
    return "\n".join([" | ".join(rows[0]), *(" | ".join(map(str, row.values())) for row in rows)])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("packed attention on a GPU: there is none here, nothing to compare", file=sys.stderr)
        return 2
    rows = compare(args.repeat)
    print(table(rows))
    return int(any(r["error_of_allowed"] > 1 for r in rows))


if __name__ == "__main__":
    sys.exit(main())
