"""Time and peak extra memory of the loss with its gradients on a CPU, next to others and to three bare products.

    python -m bench loss [--tables arms options memory topk] [--shapes 4096x1024 16384x1536] [--dtype float32] [--repeat 5]
                         [--arms ...] [--options-shape 8192x1024] [--memory-shape 16384x1536] [--topk-shape N M D] [--csv FILE]

arms      everyone's value and gradients, minimum of interleaved runs, after a check against float64
options   ours with one option against ours without
memory    the most that is resident beyond inputs and gradients, each arm in a process of its own, with malloc as it is and with one
          that gives freed blocks back; also of loss.backward(); and N = M = 131,072, D = 64
topk      10,000 queries against 1,000,000 candidates, k = 10, against its bare product by the library that the search takes

Times are wall clock ("ms") and processor time ("cpu ms", which tells how much another program on the machine disturbed). Ratios are
of minima over interleaved runs. A verdict goes by the wall clock, of at least five runs (top-k: three); fewer are marked. The exit
code is 1 when an aim is missed or an arm of ours is wrong. On CUDA use `python -m bench gpu`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIELDS = (
    "table",
    "name",
    "n",
    "m",
    "d",
    "dtype",
    "temperature",
    "options",
    "ms",
    "cpu_ms",
    "ratio",
    "cpu_ratio",
    "ratio_to",
    "extra_mib",
    "process_mib",
    "aim",
    "verdict",
    "note",
    "repeat",
    "threads",
    "device",
    "torch",
    "python",
    "commit",
)
TEMPERATURE = 0.02
HEADLINE = (16_384, 1536)
FASTER_THAN_NAIVE, OF_THE_GEMMS = 1.25, 1.05
LEAST_RUNS = 5
MIB = 1 << 20


def about() -> dict:
    """Versions, device and commit, for every row."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return {
        "threads": torch.get_num_threads(),
        "device": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def unit(n: int, d: int, dtype, seed: int):
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1).to(dtype)


def interleaved(runs: dict, repeat: int) -> dict[str, tuple[float, float]]:
    """Minimum wall and processor milliseconds of each run, in turns; the first turn warms up and is not counted."""
    best = dict.fromkeys(runs, (float("inf"), float("inf")))
    for turn in range(repeat + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            now = ((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3)
            if turn:
                best[name] = tuple(map(min, best[name], now))
    return best


def gate(makers: dict, dtype) -> dict[str, str]:
    """Arms that are wrong, or not to be had, at a small size: name to reason. Judged by float64 and twice the naive error."""
    import torch
    import torch.nn.functional as F

    from bench.loss.peers import NORMALISING

    query, target, labels = unit(300, 64, dtype, 0), unit(300, 64, dtype, 1), torch.arange(300)

    def error(name):
        q, t = query.double().requires_grad_(), target.double().requires_grad_()
        a, b = (F.normalize(q, dim=1), F.normalize(t, dim=1)) if name in NORMALISING else (q, t)
        loss = F.cross_entropy(a @ b.T / TEMPERATURE, labels)
        loss.backward()
        got = makers[name](query, target, TEMPERATURE)()
        return [float((x.double() - y).norm() / y.norm()) for x, y in zip(got, (loss.detach(), q.grad, t.grad))]

    bad, allowed = {}, [2 * e + torch.finfo(dtype).eps for e in error("naive")]
    for name in makers:
        if name.startswith("three"):
            continue
        try:
            wrong = error(name)
        except ImportError as e:
            bad[name] = str(e).splitlines()[0]
            continue
        # who rounds each logit, as bfloat16 peers do, differs by more than twice: told, and timed all the same
        if dtype == torch.float32 and any(w > 4 * a for w, a in zip(wrong, allowed)):
            bad[name] = "wrong: relative errors " + ", ".join(f"{w:.1e}" for w in wrong)
    return bad


def table_arms(args) -> list[dict]:
    """One block a shape."""
    import torch

    from bench.loss import peers as loss_arms

    dtype, rows = getattr(torch, args.dtype), []
    chosen = {name: make for name, make in loss_arms.ALL.items() if name in args.arms}
    bad = gate({"naive": loss_arms.naive, **chosen}, dtype)
    for n, d in args.shapes:
        query, target, runs = unit(n, d, dtype, 0), unit(n, d, dtype, 1), {}
        notes = {name: reason for name, reason in bad.items() if name in chosen}
        for name, make in chosen.items():
            if name not in notes:
                try:
                    runs[name] = make(query, target, TEMPERATURE)
                except ImportError as error:
                    notes[name] = str(error)
        times = interleaved(runs, args.repeat)
        base = times.get("three torch.mm")
        print(f"\nvalue and gradients, N = M = {n}, D = {d}, {args.dtype}, temperature {TEMPERATURE}, minimum of {args.repeat}")
        for name in chosen:
            row = {"table": "arms", "name": name, "n": n, "m": n, "d": d, "dtype": args.dtype, "note": notes.get(name, "")}
            if name in times:
                row |= {"ms": times[name][0], "cpu_ms": times[name][1]}
                if base:
                    row |= {"ratio": times[name][0] / base[0], "cpu_ratio": times[name][1] / base[1], "ratio_to": "three torch.mm"}
            rows.append(row)
            show(row)
        if "ours" in bad:
            rows.append(verdict("ours against float64", float("nan"), float("nan"), False, "right", n, d, args.dtype, note=bad["ours"]))
        note = few(args.repeat)
        if {"ours", "naive"} <= set(times):
            rows.append(faster("ours against naive", times["ours"], times["naive"], FASTER_THAN_NAIVE, n, d, args.dtype, note))
        for limit in ("three torch.mm", "three oneDNN"):
            if {"ours", limit} <= set(times):
                rows.append(at_most(f"ours against {limit}", times["ours"], times[limit], OF_THE_GEMMS, n, d, args.dtype, note))
    return rows


def few(runs: int) -> str:
    """What is said of a verdict from fewer runs than it should have."""
    return "" if runs >= LEAST_RUNS else f"{runs} runs, {LEAST_RUNS} are asked for"


def show(row: dict) -> None:
    cells = [f"{row['name']:<34}"]
    if "ms" in row:
        cells.append(f"{row['ms']:>10.0f} ms {row['cpu_ms']:>10.0f} cpu ms")
    if "ratio" in row:
        cells.append(f"{row['ratio']:>7.3f} of {row['ratio_to']} ({row['cpu_ratio']:.3f} by cpu)")
    print(" ".join([*cells, row.get("verdict", ""), row.get("note", "")]).rstrip(), flush=True)


def verdict(name, ratio, cpu_ratio, good, aim, n, d, dtype="float32", note="") -> dict:
    row = {
        "table": "verdicts",
        "name": name,
        "n": n,
        "m": n,
        "d": d,
        "dtype": dtype,
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "aim": aim,
        "verdict": "PASS" if good else "MISS",
        "note": note,
    }
    print(f"{row['verdict']}  {name}: {ratio:.3f} ({cpu_ratio:.3f} by cpu), aim {aim}{f' ({note})' if note else ''}", flush=True)
    return row


def faster(name, mine, theirs, aim, n, d, dtype="float32", note="") -> dict:
    wall, cpu = theirs[0] / mine[0], theirs[1] / mine[1]
    return verdict(name + ", times as fast", wall, cpu, wall >= aim, f">= {aim}", n, d, dtype, note)


def at_most(name, mine, theirs, aim, n, d, dtype="float32", note="") -> dict:
    wall, cpu = mine[0] / theirs[0], mine[1] / theirs[1]
    return verdict(name, wall, cpu, wall <= aim, f"<= {aim:.2f}", n, d, dtype, note)


def table_options(args) -> list[dict]:
    import torch

    from bench.loss.options import cases
    from contrastive_kernels import info_nce_value_and_grad

    n, d = args.options_shape
    query, target = unit(n, d, torch.float32, 0), unit(n, d, torch.float32, 1)
    rows = []
    print(f"\none option against the plain loss, N = M = {n}, D = {d}, float32, minimum of {args.repeat}")
    for name, (options, aim) in cases(n, d).items():
        if args.options and not any(word in name for word in args.options):
            continue

        def run(given):
            return lambda: info_nce_value_and_grad(query, target, **{"temperature": TEMPERATURE, **given})

        times = interleaved({"plain": run({}), "with": run(options)}, args.repeat)
        judged = at_most(name, times["with"], times["plain"], aim, n, d, note=few(args.repeat))
        rows.append(judged | {"options": name, "ms": times["with"][0], "cpu_ms": times["with"][1]})
    return rows


def parse_shape(text: str) -> tuple[int, int]:
    try:
        n, d = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ROWSxWIDTH such as 8192x1024, got {text!r}") from None
    return n, d


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.loss.peers import ALL

    parser.add_argument("--tables", nargs="+", choices=("arms", "options", "memory", "topk"), default=["arms", "options", "memory", "topk"])
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=[(4096, 1024), HEADLINE], help="ROWSxWIDTH")
    parser.add_argument("--options-shape", type=parse_shape, default=(8192, 1024))
    parser.add_argument("--options", nargs="+", help="only options whose name holds one of these words")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--arms", nargs="+", choices=list(ALL), default=list(ALL))
    parser.add_argument("--repeat", type=int, default=LEAST_RUNS)
    parser.add_argument("--memory-shape", type=parse_shape, default=HEADLINE)
    parser.add_argument("--topk-shape", type=int, nargs=3, default=(10_000, 1_000_000, 256), metavar=("N", "M", "D"))
    parser.add_argument("--csv", type=Path, default=ROOT / "bench/scratch/loss.csv")


def run(args) -> int:
    """Print and write the tables; exit code 1 when an aim is missed."""
    from bench.loss import memory as loss_memory

    tables = {"arms": table_arms, "options": table_options, "memory": loss_memory.table_memory, "topk": loss_memory.table_topk}
    rows = []
    for name in args.tables:
        rows += tables[name](args)
        write(args.csv, [{"temperature": TEMPERATURE, "repeat": args.repeat, **about(), **row} for row in rows])
    missed = [row["name"] for row in rows if row.get("verdict") == "MISS"]
    print(f"\nwritten to {args.csv}; " + (f"missed: {'; '.join(missed)}" if missed else "every aim is met"))
    return 1 if missed else 0


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    os.replace(part, path)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench loss", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        from bench.loss import memory as loss_memory

        print(json.dumps(loss_memory.CHILDREN[sys.argv[2]](*json.loads(sys.argv[3]))))
    else:
        sys.exit(main())
