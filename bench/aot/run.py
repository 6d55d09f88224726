"""Kernels compiled for GPUs that are not there: registers, spills, shared memory, occupancy, the hot loop, predicted times.

    python -m bench aot [--arch 80 90 100] [--csv FILE]
    make aot TRITON=3.6.0       the same by another version of triton, which lies in a folder of its own

Nothing is executed, so times are predictions; how each comes about stands in contrastive_kernels/roofline.py.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from contrastive_kernels import roofline
from contrastive_kernels.roofline import topk as roofline_topk
from contrastive_kernels.triton import configs

ARCHITECTURES = (80, 90, 100)
ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (768, 1536, 2048, 3072, 3584, 4096)
SIZES = (16_384, 65_536)


CACHE = ROOT / "bench/scratch"


def triton_version() -> str:
    import triton

    return triton.__version__


def fingerprint() -> str:
    """Of all that decides what is compiled: the kernels, their launchers, this harness and the compiler."""
    digest = hashlib.sha256(f"{triton_version()} {sys.version}".encode())
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
    held, key = CACHE / f"aot-rows-{arch}.json", fingerprint()
    if held.is_file():
        before = json.loads(held.read_text())
        if before["key"] == key:
            return before["rows"]
    made = compile_all(arch, processes)
    if any("error" in row for row in made):  # perhaps the machine's and not the kernel's: tried again next time
        return made
    CACHE.mkdir(parents=True, exist_ok=True)
    part = held.with_suffix(".part")
    part.write_text(json.dumps({"key": key, "rows": made}))
    os.replace(part, held)
    return made


def _environment() -> dict:
    """A child's: it does not interpret, and finds this tree."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH")]))
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


def seconds(row: dict) -> tuple[float, float]:
    """PREDICTED seconds of a launch as compiled, and those of the roofline: the data sheet's FLOP/s, or memory's bytes/s."""
    gpu = roofline.for_arch(row["arch"])
    threads = 32 * row["warps"] * row["grid"]
    fused = row["kernel"].startswith("_fused")
    if row["flops"]:
        # a tile's product and its epilogue; of a fused kernel the loop is both, once for every tile of its block
        tiles = row["flops"] / (2 * row["block"] * row.get("block_d", 1) * row["grid"]) if fused else 1
        instructions = threads * (row["loop_instructions"] * max(1, tiles / 2) if fused else row["epilogue"])
        rate = gpu.achieved if row["dot"] else gpu.achieved_fp32
        busy = max(row["flops"] / (rate * gpu.triton_share), row["bytes"] / gpu.bandwidth) + instructions / (
            gpu.issue * roofline.ISSUE_SHARE
        )
        peak = gpu.peak if row["dot"] else gpu.achieved_fp32
    else:
        busy, peak = max(row["bytes"] / gpu.bandwidth, threads * row["instructions"] / (gpu.issue * roofline.ISSUE_SHARE)), gpu.peak
    return busy, max(row["flops"] / peak, row["bytes"] / gpu.bandwidth)


def tile_of(row: dict) -> str:
    return "x".join(str(v) for k, v in row.items() if k.startswith("block_") and isinstance(v, int)) + f" w{row['warps']} s{row['stages']}"


def table(rows: list[dict]) -> str:
    """Markdown, one line a kernel and architecture. FLOPs and bytes are those of the compiled launch, 512 x 1,024 at D = 1,536."""
    lines = [
        "| arch | kernel | tile | registers | spills | shared KiB | blocks/SM | occupancy | hot loop | epilogue instr. | MFLOP | MiB | share of roofline (PREDICTED) | verdict |",
        "|---|---|---|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['arch']} | {row['case']} |" + " |" * 11 + f" {' '.join(verdict(row)[0].split()).replace('|', '/')} |")
            continue
        loop = " ".join(f"{v} {k}" for k, v in list(row["loop"].items())[:4])
        busy, least = seconds(row)
        lines.append(
            f"| {row['arch']} | {row['case']} | {tile_of(row)} | {row['registers']} | {row['spills']} | {row['shared'] / 1024:.0f} | "
            f"{row['blocks_per_sm']} | {row['occupancy']:.0%} | {loop} | {row['epilogue']} | {row['flops'] / 1e6:.0f} | {row['bytes'] / 2**20:.1f} | "
            f"{f'{least / busy:.0%}' if busy else ''} | {'; '.join(verdict(row)) or 'good'} |"
        )
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
    lines = [
        "| arch | kernel | tile | registers | spills | shared KiB | blocks/SM | occupancy | hot loop | note |",
        "|---|---|---|--:|--:|--:|--:|--:|---|---|",
    ]
    for row in rows:
        if "note" in row:
            lines.append(f"| {row['arch']} | {row['case']} | | | | | | | | {row['note'].replace('|', '/')} |")
            continue
        loop = " ".join(f"{v} {k}" for k, v in list(row["loop"].items())[:4])
        lines.append(
            f"| {row['arch']} | {row['case']} | {tile_of(row)} | {row['registers']} | {row['spills']} | {row['shared'] / 1024:.0f} | {row['blocks_per_sm']} | "
            f"{row['occupancy']:.0%} | {loop} | |"
        )
    return "\n".join(lines)


def per_element(rows: list[dict], arch: int, case: str = "stats") -> float:
    """Instructions of an exponential epilogue, a thread and element of its tile, as compiled."""
    row = next(r for r in rows if r["arch"] == arch and r["case"] == f"exp panel, {case}, bfloat16")
    return row["epilogue"] / (row["block"] / (32 * row["warps"]))


def fused_per_element(rows: list[dict], arch: int) -> float:
    """Instructions of the costlier plain fused pass, a thread and element of its tile, its products included."""
    cases = [f"fused, {which} D={width}, bfloat16" for which in ("forward", "backward") for width in (64, 128)]
    return max(r["loop_instructions"] / (r["block"] / (32 * r["warps"])) for r in rows if r["arch"] == arch and r["case"] in cases)


def predictions(rows: list[dict]) -> str:
    """Markdown: PREDICTED time of value and gradients against three library products, bfloat16, with the arithmetic."""
    lines = [
        "\nPREDICTED, nothing was run. One direction, value and both gradients, bfloat16; panels of at most 4,096 rows above N = 16,384.\n"
    ]
    lines += [
        "| GPU | N = M | D | logits ms | of it epilogue | d_query ms | d_target ms | rest ms | ours ms | three GEMMs ms | ratio | roofline share |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for arch in sorted({row["arch"] for row in rows}):
        gpu, instructions = roofline.for_arch(arch), per_element(rows, arch, "plain")  # which panels of these sizes take
        for n in SIZES:
            for d in WIDTHS:
                pieces, limit = predicted(gpu, n, d, instructions)
                ms = {}
                for piece in pieces:
                    kind = next((k for k in ("logits", "d_query", "d_target") if piece.name.startswith(k)), "rest")
                    ms[kind] = ms.get(kind, 0) + piece.seconds * piece.times * 1e3
                total, epilogue = sum(ms.values()), n * n * instructions / (gpu.issue * roofline.ISSUE_SHARE) * 1e3
                share = 6 * n * n * d / gpu.peak * 1e3 / total
                lines.append(
                    f"| {gpu.name} | {n} | {d} | {ms['logits']:.2f} | {epilogue:.2f} | {ms['d_query']:.2f} | {ms['d_target']:.2f} | {ms['rest']:.2f} "
                    f"| {total:.2f} | {limit * 1e3:.2f} | {total / limit / 1e3:.3f} | {share:.0%} |"
                )
    return "\n".join(lines)


def predicted(gpu, n: int, d: int, instructions: float):
    """Pieces of one direction at N = M = n, and the seconds of the three library products."""
    tile = configs.exp_panel_tile(gpu.arch, 2, n)
    pieces = roofline.panels(gpu, n, n, d, n if n <= 16_384 else 4096, itemsize=2, tile=tile, instructions=instructions)
    return pieces, roofline.three_gemms(gpu, n, n, d, itemsize=2)


def bound(d: int) -> float:
    """How many times the three bare products the predicted time may be; triton 3.6 takes a few instructions more an element."""
    # a guard against kernels and tiles that get dearer: both sides are the model's own
    return 1.43 if d <= 768 else 1.19 if triton_version().startswith("3.6.") else 1.18


def too_slow(rows: list[dict]) -> list[str]:
    """Predictions beyond `bound` on sm_80 and sm_90, by name."""
    out = []
    for arch in sorted({row["arch"] for row in rows} & {80, 90}):
        for n in SIZES:
            for d in WIDTHS:
                pieces, limit = predicted(roofline.for_arch(arch), n, d, per_element(rows, arch, "plain"))
                ratio = roofline.seconds(pieces) / limit
                if ratio > bound(d):
                    out.append(f"sm_{arch} N=M={n} D={d}: {ratio:.3f}")
    return out


SEARCH = dict(queries=10_000, targets=1_000_000, width=256, kept=16)


def search(rows: list[dict], arch: int) -> tuple[list[roofline.Piece], float]:
    """Pieces of `SEARCH` in bfloat16 with the kernel as compiled, and the seconds of its bare product."""
    row = next(r for r in rows if r["arch"] == arch and r["case"] == f"topk, k {SEARCH['kept']}, bfloat16")
    gpu = roofline.for_arch(arch)
    selection = roofline_topk.Selection(
        row["block_r"],
        row["block_c"],
        32 * row["warps"],
        row["blocks_per_sm"],
        row["loop_instructions"] - row["inner_instructions"],
        row["inner_instructions"],
        bool(row["resident"]),
    )
    shares = configs.topk_shares(
        gpu.sms * (2 if row["resident"] else 4), -(-SEARCH["queries"] // row["block_r"]), -(-SEARCH["targets"] // row["block_c"])
    )
    bare = roofline.gemm(gpu, SEARCH["queries"], SEARCH["targets"], SEARCH["width"], itemsize=2, out_itemsize=0)
    return roofline_topk.topk(gpu, **SEARCH, selection=selection, shares=shares), bare.seconds


def searches(rows: list[dict]) -> str:
    """Markdown: PREDICTED time of a search against its bare product, whose scores nobody would write."""
    lines = [
        "\nPREDICTED, nothing was run. The 16 best of 1,000,000 targets for 10,000 queries, D = 256, bfloat16, targets in random order.\n"
    ]
    lines += ["| GPU | kernel ms | merging ms | bare product ms | ratio |", "|---|--:|--:|--:|--:|"]
    for arch in sorted({row["arch"] for row in rows}):
        (kernel, merge), bare = search(rows, arch)
        lines.append(
            f"| {roofline.for_arch(arch).name} | {kernel.seconds * 1e3:.2f} | {merge.seconds * 1e3:.2f} | {bare * 1e3:.2f} | {(kernel.seconds + merge.seconds) / bare:.2f} |"
        )
    return "\n".join(lines)


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    part = path.with_suffix(path.suffix + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capabilities times ten")
    parser.add_argument("--csv", type=Path, default=ROOT / "bench/scratch/aot.csv", help="where the table is written")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="also compile the kernels of peers that are installed"
    )


def run(args) -> int:
    made = [row for arch in args.arch for row in rows(arch, args.processes)]
    print(table(made))
    write_csv(args.csv, made)
    peers = [row for arch in args.arch for row in peer_rows(arch)] if args.peers else []
    if peers:
        print("\nPeers' kernels, compiled the same way; of an autotuned one the first configuration it would try.\n")
        print(peer_table(peers))
        write_csv(args.csv.with_name(args.csv.stem + "-peers.csv"), peers)
    built = [row for row in made if "error" not in row]
    print(predictions(built))
    print(searches(built))
    bad_times = too_slow(built)
    bad = [row for row in made if verdict(row)]
    print(
        f"\nPREDICTED bound: at most {bound(1536)} times the three products, {bound(768)} at D = 768, on sm_80 and sm_90: {'; '.join(bad_times) or 'held everywhere'}"
    )
    print(f"triton {triton_version()}: {len(built)} of {len(made)} kernels compiled, {len(bad)} with a fault; written to {args.csv}")
    return 1 if bad or bad_times else 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench aot", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
