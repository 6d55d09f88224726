"""One command for a machine with CUDA: every kernel against float64, then the timings.

    python -m bench gpu [--sizes 4096 16384 65536] [--widths 768 1536 3584] [--output bench/results/gpu]

Writes OUTPUT.csv, OUTPUT.md and OUTPUT-attention.csv as it goes. Exits 1 when a kernel is wrong (nothing is timed then, without
--keep-going), 2 without CUDA.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import gpu_gate, gpu_options, gpu_peers
from bench.aot import write_csv

ROOT = Path(__file__).resolve().parent.parent
FIELDS = (
    "name", "device", "dtype", "n", "m", "d", "temperature", "ms_p20", "ms_p50", "ms_p80", "peak_extra_mib", "times_three_gemms", "tflops",
    "loss_error", "d_query_error", "d_target_error", "predicted_ms", "note", "torch", "triton", "commit",
)
SHORT = ("name", "ms_p20", "ms_p50", "ms_p80", "peak_extra_mib", "times_three_gemms", "tflops", "loss_error", "d_query_error", "d_target_error", "predicted_ms", "note")


class Cuda:
    """Times and memory of the GPU; `Host` is the same of a CPU, for the test of this file."""

    name = "cuda"

    def milliseconds(self, run) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_mib(self, run):
        """(result, MiB beyond what is there already)."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

    def forget(self):
        torch.cuda.empty_cache()

    def title(self) -> str:
        return torch.cuda.get_device_name()

    def room_for_truth(self, n: int) -> bool:
        """Whether float64 logits, their softmax and gradient fit beside the rest."""
        return 4 * 8 * n * n < torch.cuda.mem_get_info()[0]


class Host:
    name = "cpu"

    def milliseconds(self, run) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    def peak_mib(self, run):
        return run(), ""

    def forget(self):
        pass

    def title(self) -> str:
        return "CPU (nothing here is a measurement)"

    def room_for_truth(self, n: int) -> bool:
        return True


def truth(query, target, temperature, kind: str):
    """Loss and gradients in float64: InfoNCE with the diagonal as positives, in "one" direction or the mean of "both", or "sigmoid"."""
    q, t = query.double().requires_grad_(), target.double().requires_grad_()
    cosine, labels = q @ t.T, torch.arange(len(q), device=q.device)
    if kind == "sigmoid":
        logits = cosine * gpu_peers.SCALE + gpu_peers.BIAS
        loss = -torch.nn.functional.logsigmoid(-logits).sum(1).mean() - logits.diagonal().mean()
    else:
        loss = torch.nn.functional.cross_entropy(cosine / temperature, labels)
        if kind == "both":
            loss = (loss + torch.nn.functional.cross_entropy(cosine.T / temperature, labels)) / 2
    loss.backward()
    return loss.detach(), q.grad, t.grad


def gate(device: str, **small) -> list[str]:
    """The kernels' own tests, which take the GPU where there is one, then every option on every way. Returns complaints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    tests = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/kernels/test_triton_*.py"))
    print("tests of the kernels on this device:", *tests, flush=True)
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=ROOT, env=environment)
    wrong = [] if ran.returncode == 0 else ["tests/kernels/test_triton_*.py failed on this GPU"]
    rows = gpu_gate.check(device, **small)
    wrong += [f"{row['options']}, {row['path']}, {row['dtype']}: {complaint}" for row in rows for complaint in row["wrong"]]
    print(f"{len(rows)} combinations of options, way and type against float64, {sum(bool(row['wrong']) for row in rows)} wrong", flush=True)
    if device == "cuda":
        wrong += gpu_gate.far(device)
    return wrong


def measure(clock, make, query, target, temperature, repeats, expected) -> dict:
    """One row; a peer that is missing or refuses the shape is a row with its reason, not the end of the table."""
    row = {}
    try:
        run = make(query, target, temperature)
        run()  # compiles
        result, row["peak_extra_mib"] = clock.peak_mib(run)
        if expected is not None and result is not None:
            for field, got, right in zip(("loss_error", "d_query_error", "d_target_error"), result, expected):
                row[field] = f"{gpu_gate.relative(got, right):.2e}"
        del result
        for _ in range(3):
            run()
        times = [clock.milliseconds(run) for _ in range(repeats)]
        low, _, _, high = statistics.quantiles(times, n=5)
        row |= {"ms_p20": round(low, 3), "ms_p50": round(statistics.median(times), 3), "ms_p80": round(high, 3)}
    except Exception as error:  # whatever a peer raises
        row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    clock.forget()
    return row


def versions(clock) -> dict:
    import triton

    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:  # no git
        commit = ""
    return {"device": clock.title(), "torch": torch.__version__, "triton": triton.__version__, "commit": commit}


def predicted(name: str, query, target) -> dict:
    """What the cost model says of our own rows, to be held against what is measured."""
    from contrastive_kernels import dispatch, roofline
    from contrastive_kernels.triton import configs

    if not name.startswith("contrastive_kernels triton"):
        return {}
    gpu = roofline.for_arch(configs.architecture(query.device) or 90)
    symmetric = "symmetric" in name
    plan = dispatch.plan(len(query), len(target), query.shape[1], query.dtype, workspace=8 << 30, gpu=gpu, symmetric=symmetric)
    return {"predicted_ms": round(plan.chosen.seconds * 1e3, 3)}


def block(clock, table: dict, n: int, m: int, d: int, args, kind: str, about: dict) -> list[dict]:
    """Everyone's rows of one shape."""
    torch.manual_seed(0)
    query, target = (gpu_gate.unit(rows, d, dtype=torch.bfloat16, device=clock.name) for rows in (n, m))
    expected = truth(query, target, args.temperature, kind) if kind not in ("search", "options") and clock.room_for_truth(n) else None
    clock.forget()
    rows, limit = [], None
    for name, make in table.items():
        got = measure(clock, make, query, target, args.temperature, args.repeats, expected)
        if name == gpu_peers.LIMIT:
            limit = got.get("ms_p50")
        if got.get("ms_p50"):
            got["times_three_gemms"] = round(got["ms_p50"] / limit, 3) if limit else ""
            got["tflops"] = round((2 if kind == "search" else 6) * n * m * d / got["ms_p50"] / 1e9, 1)
        got |= predicted(name, query, target)
        rows.append(dict.fromkeys(FIELDS, "") | about | {"name": name, "dtype": "bfloat16", "n": n, "m": m, "d": d, "temperature": args.temperature} | got)
        print(f"{n:>6} {d:>5} {name:<50} {got.get('ms_p50', got.get('note'))}", flush=True)
    return rows


def markdown(rows: list[dict]) -> str:
    """One table a shape."""
    first = rows[0]
    lines = [f"# {first['device']}, torch {first['torch']}, triton {first['triton']}, commit {first['commit']}", ""]
    lines += ["Value and gradients, milliseconds; `tflops` counts the 6 NMD of one direction, 2 NMD of a search; errors are norms against float64 of the same bfloat16 inputs."]
    shape = None
    for row in rows:
        if (row["n"], row["m"], row["d"]) != shape:
            shape = row["n"], row["m"], row["d"]
            lines += ["", f"## N = {shape[0]}, M = {shape[1]}, D = {shape[2]}, temperature {row['temperature']}", ""]
            lines += ["| " + " | ".join(SHORT) + " |", "|" + "---|" * len(SHORT)]
        lines.append("| " + " | ".join(str(row[field]).replace("|", "/") for field in SHORT) + " |")
    return "\n".join(lines) + "\n"


def attention(args, device: str) -> int:
    """Providers of packed attention; a failure is told and ends nothing."""
    try:
        from bench import gpu_attention

        rows = gpu_attention.compare(args.repeats, device=device)
    except Exception as error:
        print(f"packed attention was not compared: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    write_csv(args.output.with_name(args.output.name + "-attention.csv"), rows)
    print(gpu_attention.table(rows))
    return int(any(row["error_of_allowed"] > 1 for row in rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 16_384, 65_536], help="N = M")
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 1536, 3584])
    parser.add_argument("--search", type=int, nargs=3, default=[10_000, 1_000_000, 256], metavar=("N", "M", "D"), help="shape of one large search")
    parser.add_argument("--temperature", type=float, default=0.02)
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each, at least 2")
    parser.add_argument("--keep-going", action="store_true", help="time although a result is wrong; the exit status stays 1")
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/gpu", help="without suffix; .csv and .md are added")


def run(args, clock=None, **small) -> int:
    if clock is None and not torch.cuda.is_available():
        print("python -m bench gpu: no CUDA device here; `python -m bench aot` needs none", file=sys.stderr)
        return 2
    clock = clock or Cuda()
    wrong = gate(clock.name, **small)
    if wrong:
        print("\n".join(["results are wrong:", *wrong]), file=sys.stderr)
        if not args.keep_going:
            print("not timed; --keep-going times all the same", file=sys.stderr)
            return 1
    rows, about, suffix = [], versions(clock), args.output.suffix
    path = args.output.with_suffix("") if suffix in (".csv", ".md") else args.output
    path.parent.mkdir(parents=True, exist_ok=True)
    failed = bool(wrong) | attention(argparse.Namespace(**{**vars(args), "output": path}), clock.name)
    shapes = []
    for n in args.sizes:
        for d in args.widths:
            tables = (gpu_options.table(n, d), "options"), (gpu_peers.ONE, "one"), (gpu_peers.BOTH, "both"), (gpu_peers.SIGMOID, "sigmoid"), (gpu_peers.SEARCH, "search")
            shapes += [(n, n, d, *table) for table in tables]
    shapes.insert(1, (*args.search, gpu_peers.SEARCH, "search"))  # before any peer, which may end the process
    for n, m, d, table, kind in shapes:
        rows += block(clock, table, n, m, d, args, kind, about)
        # written anew after every shape: what was measured survives a peer that takes the process down
        write_csv(path.with_name(path.name + ".csv"), rows)
        part = path.with_name(path.name + ".md.part")
        part.write_text(markdown(rows))
        os.replace(part, path.with_name(path.name + ".md"))
    print(f"written to {path}.csv and {path}.md")
    return int(failed)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
