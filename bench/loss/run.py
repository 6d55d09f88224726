"""Time and peak extra memory of the loss with its gradients on a CPU, next to others and to three bare products.

    python -m bench loss [--tables peers options distillation memory topk] [--shapes 4096x1024 16384x1536] [--dtype float32] [--repeat 5]
                         [--peers ...] [--options-shape 8192x1024] [--memory-shape 16384x1536] [--topk-shape N M D] [--csv FILE]

peers     everyone's value and gradients, minimum of interleaved runs, after a check against float64
options   ours with one option against ours without
distillation   the loss drawn to a teacher's: ours, autograd's, the four bare products; errors; memory
memory    the most that is resident beyond inputs and gradients, each peer in a process of its own, with malloc as it is and with one
          that gives freed blocks back; also of loss.backward(); and N = M = 131,072, D = 64
topk      10,000 queries against 1,000,000 candidates, k = 10, against its bare product by the library that the search takes

Times are wall clock ("ms") and processor time ("cpu ms", which tells how much another program on the machine disturbed). Ratios are
of minima over interleaved runs. A verdict goes by the wall clock, of at least five runs (top-k: three); fewer are marked. The exit
code is 1 when an aim is missed or ours is wrong. On CUDA use `python -m bench gpu`.
"""

from __future__ import annotations

import argparse
import sys

from bench import tables
from bench.loss import distillation, memory
from bench.loss.verdicts import LEAST_RUNS, TEMPERATURE, at_most, faster, few, show, verdict
from bench.measure import interleaved, unit_rows
from bench.peers import on_cpu

HEADLINE = (16_384, 1536)
FASTER_THAN_NAIVE, OF_THE_GEMMS = 1.25, 1.05
TABLES = ("peers", "options", "distillation", "memory", "topk")


def gate(makers: dict, dtype) -> dict[str, str]:
    """Peers that are wrong, or not to be had, at a small size: name to reason. Judged by float64 and twice the naive error."""
    import torch
    import torch.nn.functional as F

    query, target, labels = unit_rows(300, 64, dtype, 0), unit_rows(300, 64, dtype, 1), torch.arange(300)

    def error(name):
        q, t = query.double().requires_grad_(), target.double().requires_grad_()
        a, b = (F.normalize(q, dim=1), F.normalize(t, dim=1)) if name in on_cpu.NORMALISING else (q, t)
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


def table_peers(args) -> list[dict]:
    """One block a shape."""
    import torch

    dtype, rows = getattr(torch, args.dtype), []
    chosen = {name: make for name, make in on_cpu.ALL.items() if name in args.peers}
    bad = gate({"naive": on_cpu.naive, **chosen}, dtype)
    for n, d in args.shapes:
        query, target, runs = unit_rows(n, d, dtype, 0), unit_rows(n, d, dtype, 1), {}
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
            row = {"part": "peers", "name": name, "n": n, "m": n, "d": d, "dtype": args.dtype, "note": notes.get(name, "")}
            if name in times:
                row |= {"ms_min": times[name][0], "cpu_ms": times[name][1]}
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


def table_options(args) -> list[dict]:
    import torch

    from bench.options import cases
    from contrastive_kernels import info_nce_value_and_grad

    n, d = args.options_shape
    query, target = unit_rows(n, d, torch.float32, 0), unit_rows(n, d, torch.float32, 1)
    rows = []
    print(f"\none option against the plain loss, N = M = {n}, D = {d}, float32, minimum of {args.repeat}")
    for name, (options, aim) in cases(n, d).items():
        if args.options and not any(word in name for word in args.options):
            continue

        def run(given):
            return lambda: info_nce_value_and_grad(query, target, **{"temperature": TEMPERATURE, **given})

        times = interleaved({"plain": run({}), "with": run(options)}, args.repeat)
        judged = at_most(name, times["with"], times["plain"], aim, n, d, note=few(args.repeat))
        rows.append(judged | {"options": name, "ms_min": times["with"][0], "cpu_ms": times["with"][1]})
    return rows


def table_named(text: str) -> str:
    """The name of a table; "arms" is what "peers" was called before."""
    return "peers" if text == "arms" else text


def parse_shape(text: str) -> tuple[int, int]:
    try:
        n, d = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ROWSxWIDTH such as 8192x1024, got {text!r}") from None
    return n, d


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tables", nargs="+", type=table_named, choices=TABLES, default=list(TABLES))
    parser.add_argument("--shapes", type=parse_shape, nargs="+", default=[(4096, 1024), HEADLINE], help="ROWSxWIDTH")
    parser.add_argument("--options-shape", type=parse_shape, default=(8192, 1024))
    parser.add_argument("--distillation-shape", type=parse_shape, default=(8192, 1024))
    parser.add_argument("--options", nargs="+", help="only options whose name holds one of these words")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--peers", "--arms", nargs="+", choices=list(on_cpu.ALL), default=list(on_cpu.ALL))
    parser.add_argument("--repeat", type=int, default=LEAST_RUNS)
    parser.add_argument("--memory-shape", type=parse_shape, default=HEADLINE)
    parser.add_argument("--topk-shape", type=int, nargs=3, default=(10_000, 1_000_000, 256), metavar=("N", "M", "D"))


def run(args) -> int:
    """Print and write the tables; exit code 1 when an aim is missed."""
    makers = {
        "peers": table_peers,
        "options": table_options,
        "distillation": distillation.table,
        "memory": memory.table_memory,
        "topk": memory.table_topk,
    }
    about, rows = tables.versions(), []
    for name in args.tables:
        rows += makers[name](args)
        tables.write_csv(args.csv, rows, {"temperature": TEMPERATURE, "repeat": args.repeat, **about})
    missed = [row["name"] for row in rows if row.get("verdict") == "MISS"]
    print(f"\nwritten to {args.csv}; " + (f"missed: {'; '.join(missed)}" if missed else "every aim is met"))
    return 1 if missed else 0


def main(argv=None) -> int:
    parser = tables.parser("loss", __doc__, tables.SCRATCH / "loss.csv")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
