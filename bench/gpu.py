"""One command for a machine with CUDA: every kernel against float64, then the timings.

    python -m bench gpu [--sizes 4096 16384] [--widths 768 1536 3584] [--output bench/results/gpu]

Writes OUTPUT.csv and OUTPUT.md. Exits 1 when a kernel is wrong (nothing is timed then), 2 without CUDA.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
GATE_N, GATE_D = 512, 256
FIELDS = (
    "name", "device", "dtype", "n", "m", "d", "temperature", "ms_p20", "ms_p50", "ms_p80", "peak_extra_mib", "share_of_three_gemms",
    "loss_error", "d_query_error", "d_target_error", "note", "torch", "triton", "commit",
)


def unit(n, d, dtype, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, device="cuda", generator=generator), dim=1).to(dtype)


def truth(query, target, temperature):
    """Loss and gradients of diagonal InfoNCE in float64."""
    q, t = query.double().requires_grad_(), target.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(q @ t.T / temperature, torch.arange(len(q), device=q.device))
    loss.backward()
    return loss.detach(), q.grad, t.grad


def relative(got, expected) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def gate() -> list[str]:
    """The suite of kernel tests, which take the GPU where there is one; and ours against eager's error. Returns complaints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    tests = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/kernels/test_triton_*.py"))
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT, env=environment)
    wrong = [] if ran.returncode == 0 else ["tests/kernels/test_triton_*.py failed on this GPU"]
    from bench import gpu_peers

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        query, target = unit(GATE_N, GATE_D, dtype, 0), unit(GATE_N, GATE_D, dtype, 1)
        expected = truth(query, target, 0.05)
        mine = [relative(a, b) for a, b in zip(gpu_peers.ours(query, target, 0.05)(), expected)]
        theirs = [relative(a, b) for a, b in zip(gpu_peers.eager(query, target, 0.05)(), expected)]
        for name, a, b in zip(("loss", "d_query", "d_target"), mine, theirs):
            if not a <= 2 * b + torch.finfo(dtype).eps:
                wrong.append(f"{name} in {dtype}: relative error {a:.2e}, eager's {b:.2e}")
    return wrong


def time_ms(run, repeats: int) -> list[float]:
    for _ in range(3):
        run()
    out = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        out.append(start.elapsed_time(end))
    return sorted(out)


def measure(name, make, query, target, temperature, repeats, expected) -> dict:
    row = {"name": name}
    try:
        run = make(query, target, temperature)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        row["peak_extra_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        if expected is not None and "limit" not in name:
            for field, got, right in zip(("loss_error", "d_query_error", "d_target_error"), result, expected):
                row[field] = f"{relative(got, right):.2e}"
        del result
        times = time_ms(run, repeats)
        quantiles = statistics.quantiles(times, n=5)
        row |= {"ms_p20": round(quantiles[0], 3), "ms_p50": round(statistics.median(times), 3), "ms_p80": round(quantiles[3], 3)}
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        # a peer that is missing or refuses the shape is a row with its reason, not the end of the table
        row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    torch.cuda.empty_cache()
    return row


def versions() -> dict:
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "commit": commit}


def markdown(rows: list[dict]) -> str:
    shown = [f for f in FIELDS if f not in ("device", "torch", "triton", "commit")]
    lines = [f"# {rows[0]['device']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}, commit {rows[0]['commit']}", "", "Measured. Value and gradients, times in ms.", ""]
    lines += ["| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(f, "")) for f in shown) + " |" for row in rows]) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16_384, 65_536], help="N = M")
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 1536, 3584])
    parser.add_argument("--temperature", type=float, default=0.02)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/gpu", help="without suffix; .csv and .md are added")


def run(args) -> int:
    if not torch.cuda.is_available():
        print("python -m bench gpu: no CUDA device here; `python -m bench aot` needs none", file=sys.stderr)
        return 2
    wrong = gate()
    if wrong:
        print("\n".join(["not timed, since results are wrong:", *wrong]), file=sys.stderr)
        return 1
    from bench import gpu_peers
    from bench.aot import write_csv

    rows, about = [], versions()
    for n in args.sizes:
        for d in args.widths:
            query, target = unit(n, d, torch.bfloat16, 0), unit(n, d, torch.bfloat16, 1)
            # float64 truth of 4,096 rows is 0.5 GB of logits; larger ones are timed only
            expected = truth(query, target, args.temperature) if n <= 8192 else None
            block = []
            for name, make in gpu_peers.ALL.items():
                row = measure(name, make, query, target, args.temperature, args.repeats, expected)
                block.append(dict.fromkeys(FIELDS, "") | about | {"dtype": "bfloat16", "n": n, "m": n, "d": d, "temperature": args.temperature} | row)
                print(f"{n:>6} {d:>5} {name:<30} {row.get('ms_p50', row.get('note'))}", flush=True)
            limit = block[-1]["ms_p50"]
            for row in block:
                row["share_of_three_gemms"] = round(row["ms_p50"] / limit, 3) if row["ms_p50"] and limit else ""
            rows += block
            write_csv(args.output.with_suffix(".csv"), rows)
            part = args.output.with_suffix(".md.part")
            part.write_text(markdown(rows))
            os.replace(part, args.output.with_suffix(".md"))
    print(f"written to {args.output.with_suffix('.csv')} and {args.output.with_suffix('.md')}")
    return 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
