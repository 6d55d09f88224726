"""PREDICTED times of what was compiled: the cost model's arithmetic with the instructions that the machine code has."""

from __future__ import annotations

from contrastive_kernels import roofline
from contrastive_kernels.roofline import topk as roofline_topk
from contrastive_kernels.triton import configs

WIDTHS = (768, 1536, 2048, 3072, 3584, 4096)
SIZES = (16_384, 65_536)


def triton_version() -> str:
    import triton

    return triton.__version__


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


def per_element(rows: list[dict], arch: int, case: str = "stats") -> float:
    """Instructions of an exponential epilogue, a thread and element of its tile, as compiled."""
    row = next(r for r in rows if r["arch"] == arch and r["case"] == f"exp panel, {case}, bfloat16")
    return row["epilogue"] / (row["block"] / (32 * row["warps"]))


def fused_per_element(rows: list[dict], arch: int) -> float:
    """Instructions of the costlier plain fused pass, a thread and element of its tile, its products included."""
    cases = [f"fused, {which} D={width}, bfloat16" for which in ("forward", "backward") for width in (64, 128)]
    return max(r["loop_instructions"] / (r["block"] / (32 * r["warps"])) for r in rows if r["arch"] == arch and r["case"] in cases)


def losses(rows: list[dict]) -> str:
    """Markdown: PREDICTED time of value and gradients against three library products, bfloat16, with the arithmetic."""
    lines = [
        "\nPREDICTED, nothing was run. One direction, value and both gradients, bfloat16; panels of at most 4,096 rows above N = 16,384.\n"
    ]
    lines += [
        "| GPU | N = M | D | logits ms | of it epilogue | d_query ms | d_target ms | rest ms | ours ms | three GEMMs ms | ratio "
        "| roofline share |",
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
                    f"| {gpu.name} | {n} | {d} | {ms['logits']:.2f} | {epilogue:.2f} | {ms['d_query']:.2f} | {ms['d_target']:.2f} "
                    f"| {ms['rest']:.2f} | {total:.2f} | {limit * 1e3:.2f} | {total / limit / 1e3:.3f} | {share:.0%} |"
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
    splits = configs.topk_splits(
        gpu.sms * (2 if row["resident"] else 4), -(-SEARCH["queries"] // row["block_r"]), -(-SEARCH["targets"] // row["block_c"])
    )
    bare = roofline.gemm(gpu, SEARCH["queries"], SEARCH["targets"], SEARCH["width"], itemsize=2, out_itemsize=0)
    return roofline_topk.topk(gpu, **SEARCH, selection=selection, splits=splits), bare.seconds


def searches(rows: list[dict]) -> str:
    """Markdown: PREDICTED time of a search against its bare product, whose scores nobody would write."""
    lines = [
        "\nPREDICTED, nothing was run. The 16 best of 1,000,000 targets for 10,000 queries, D = 256, bfloat16, targets in random order.\n"
    ]
    lines += ["| GPU | kernel ms | merging ms | bare product ms | ratio |", "|---|--:|--:|--:|--:|"]
    for arch in sorted({row["arch"] for row in rows}):
        (kernel, merge), bare = search(rows, arch)
        ms = " | ".join(f"{seconds * 1e3:.2f}" for seconds in (kernel.seconds, merge.seconds, bare))
        lines.append(f"| {roofline.for_arch(arch).name} | {ms} | {(kernel.seconds + merge.seconds) / bare:.2f} |")
    return "\n".join(lines)
