"""Kernels compiled for GPUs that are not there: registers, spills, shared memory, occupancy, the hot loop, predicted times.

    python -m bench aot [--arch 80 90 100] [--csv FILE]
    make aot TRITON=3.6.0       the same by another version of triton, which lies in a folder of its own

Nothing is executed, so times are predictions; how each comes about stands in contrastive_kernels/roofline.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys

from bench import tables
from bench.aot import predictions
from bench.measure import ROOT, child_environment

ARCHITECTURES = (80, 90, 100)
CACHE = tables.SCRATCH
REPORT = (
    *("arch", "kernel", "tile", "registers", "spills", "shared KiB", "blocks/SM", "occupancy", "hot loop"),
    *("epilogue instr.", "MFLOP", "MiB", "share of roofline (PREDICTED)", "verdict"),
)
PEER_REPORT = (*REPORT[:9], "note")
LEFT = ("arch", "kernel", "tile", "hot loop", "verdict", "note")  # columns of words


def fingerprint() -> str:
    """Of all that decides what is compiled: the kernels, their launchers, this harness and the compiler."""
    digest = hashlib.sha256(f"{predictions.triton_version()} {sys.version}".encode())
    for path in sorted(
        [
            *(ROOT / "kernels/contrastive_kernels/triton").rglob("*.py"),
            *(ROOT / "kernels/contrastive_kernels/roofline").glob("*.py"),
            *ROOT.glob("bench/aot/*.py"),
        ]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def rows(arch: int, processes: int = 2) -> list[dict]:
    """`compile_all` for one architecture, or what it gave for the same sources before."""
    cached, key = CACHE / f"aot-rows-{arch}.json", fingerprint()
    if cached.is_file():
        before = json.loads(cached.read_text())
        if before["key"] == key:
            return before["rows"]
    compiled = compile_all(arch, processes)
    if any("error" in row for row in compiled):  # perhaps the machine's and not the kernel's: tried again next time
        return compiled
    CACHE.mkdir(parents=True, exist_ok=True)
    tables.write_whole(cached, json.dumps({"key": key, "rows": compiled}))
    return compiled


def _environment() -> dict[str, str]:
    """A child's: it does not interpret, and finds this tree."""
    environment = child_environment(without=("TRITON_INTERPRET",))
    environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def compile_all(arch: int, processes: int = 2) -> list[dict]:
    """Rows of `bench.aot.compile` for an architecture, built by `processes` children that do not interpret."""
    environment = _environment()
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.aot.compile", str(arch), str(first), str(processes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for first in range(processes)
    ]
    out = []
    try:
        for child in children:
            printed, error = child.communicate()
            if child.returncode:
                raise RuntimeError(f"compiling for sm_{arch} failed:\n{error[-4000:]}")
            out += [json.loads(line) for line in printed.splitlines()]
    finally:
        for child in children:
            child.kill()  # where the other one failed, or a test ran out of time
    return out


def verdict(row: dict) -> list[str]:
    """What is wrong with a kernel; empty when nothing is."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    wrong = []
    if row["spills"]:
        wrong.append(f"{row['spills']} spills")
    if row["shared"] > row["shared_limit"]:
        wrong.append(f"shared memory {row['shared']} over {row['shared_limit']}")
    if row["dot"] and not row["loop_tensor"]:
        wrong.append("no tensor-core instruction in the hot loop")
    # a fused kernel's loop also fetches the vectors of its rows and columns, which are narrow; that the operands are not is the next rule
    if row["narrow_loads"] and not row["kernel"].startswith("_fused"):
        wrong.append(f"{len(row['narrow_loads'])} copies of less than 16 bytes in the hot loop")
    if row["wide_bytes"] < row["operand_bytes"] and not row["copies_by_descriptor"]:
        wrong.append(f"{row['wide_bytes']} of {row['operand_bytes']} bytes of the operands copied 16 bytes a thread")
    if row["kernel"].startswith("_warp_specialised") and not (row["copies_by_descriptor"] and row["register_hand_overs"]):
        wrong.append("warps were not specialised")
    if row["blocks_per_sm"] < 1:
        wrong.append("no block fits on a multiprocessor")
    return wrong


def tile_of(row: dict) -> str:
    return "x".join(str(v) for k, v in row.items() if k.startswith("block_") and isinstance(v, int)) + f" w{row['warps']} s{row['stages']}"


def heading(columns: tuple[str, ...]) -> list[str]:
    """The first two lines of a Markdown table; numbers stand at the right."""
    return ["| " + " | ".join(columns) + " |", "|" + "|".join("---" if name in LEFT else "--:" for name in columns) + "|"]


def line(cells: list) -> str:
    """A row of a Markdown table."""
    words = [str(cell).replace("|", "/") for cell in cells]
    return "|" + "".join(f" {word} |" if word else " |" for word in words)


def code_cells(row: dict) -> list[str]:
    """The cells from tile to hot loop."""
    loop = " ".join(f"{count} {name}" for name, count in list(row["loop"].items())[:4])
    usage = [row["registers"], row["spills"], f"{row['shared'] / 1024:.0f}", row["blocks_per_sm"], f"{row['occupancy']:.0%}"]
    return [tile_of(row), *usage, loop]


def table(rows: list[dict]) -> str:
    """Markdown, one line a kernel and architecture. FLOPs and bytes are those of the compiled launch, 512 x 1,024 at D = 1,536."""
    lines = heading(REPORT)
    for row in rows:
        if "error" in row:
            lines.append(line([row["arch"], row["case"], *[""] * (len(REPORT) - 3), " ".join(verdict(row)[0].split())]))
            continue
        busy, least = predictions.seconds(row)
        work = [row["epilogue"], f"{row['flops'] / 1e6:.0f}", f"{row['bytes'] / 2**20:.1f}", f"{least / busy:.0%}" if busy else ""]
        lines.append(line([row["arch"], row["case"], *code_cells(row), *work, "; ".join(verdict(row)) or "good"]))
    return "\n".join(lines)


def peer_rows(arch: int) -> list[dict]:
    """Rows of `bench.aot.peers`, empty where no peer is installed."""
    child = subprocess.run(
        [sys.executable, "-m", "bench.aot.peers", str(arch)], capture_output=True, text=True, env=_environment(), cwd=ROOT
    )
    if child.returncode:
        return [{"peer": "?", "case": "bench.aot.peers", "arch": arch, "note": child.stderr.strip().splitlines()[-1][:200]}]
    return [json.loads(line) for line in child.stdout.splitlines()]


def peer_table(rows: list[dict]) -> str:
    """Markdown of the peers' kernels: facts alone, judged by nothing."""
    lines = heading(PEER_REPORT)
    for row in rows:
        cells = [""] * (len(PEER_REPORT) - 3) if "note" in row else code_cells(row)
        lines.append(line([row["arch"], row["case"], *cells, row.get("note", "")]))
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capabilities times ten")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="also compile the kernels of peers that are installed"
    )


def write(path, rows: list[dict]) -> None:
    """The rows as CSV; `name` is the case that was compiled."""
    tables.write_csv(path, [{"part": "aot", "name": row["case"], **row} for row in rows], tables.versions("compiled, not run"))


def run(args) -> int:
    """Print and write the tables; exit code 1 when a kernel is at fault or a prediction beyond its bound."""
    compiled = [row for arch in args.arch for row in rows(arch, args.processes)]
    print(table(compiled))
    write(args.csv, compiled)
    peers = [row for arch in args.arch for row in peer_rows(arch)] if args.peers else []
    if peers:
        print("\nPeers' kernels, compiled the same way; of an autotuned one the first configuration it would try.\n")
        print(peer_table(peers))
        write(args.csv.with_name(args.csv.stem + "-peers.csv"), peers)
    built = [row for row in compiled if "error" not in row]
    print(predictions.losses(built))
    print(predictions.searches(built))
    bad_times = predictions.too_slow(built)
    bad = [row for row in compiled if verdict(row)]
    wide, narrow = predictions.bound(1536), predictions.bound(768)
    held = "; ".join(bad_times) or "held everywhere"
    print(f"\nPREDICTED bound: at most {wide} times the three products, {narrow} at D = 768, on sm_80 and sm_90: {held}")
    triton = predictions.triton_version()
    print(f"triton {triton}: {len(built)} of {len(compiled)} kernels compiled, {len(bad)} with a fault; written to {args.csv}")
    return 1 if bad or bad_times else 0


def main(argv=None) -> int:
    parser = tables.parser("aot", __doc__, tables.SCRATCH / "aot.csv")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
