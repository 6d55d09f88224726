"""Which way a direction of the loss is computed on a GPU, how many rows at a time, and why.

    python -m contrastive_kernels.dispatch --rows 16384 --columns 16384 --width 1536 [--gpu h100] [--workspace-mib 256]
    python -m contrastive_kernels.dispatch --rows 16384 --columns 16384 --dims 256 512 1024

Every way that can take the problem is priced with the cost model of `roofline.py`; the cheapest is taken, and of equal ones (within
5 %) the one with the least scratch. Prices are PREDICTED.

* exp      panels of exponentials in the inputs' type from the product's own epilogue; bfloat16 without label smoothing
* chunk    float32 logits by the library, then kernels over them; takes everything
* fused    no panel at all, logits computed twice; 2-byte types, D up to 128, no label smoothing
* dense    every float32 logit in memory, one kernel over them with the positives in it: the fewest launches, for plain losses
* joint    both directions of `symmetric` from one kept panel; where each row's pair is its column and the panel fits (triton/symmetric.py)
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass

from . import roofline
from .triton import configs

MIB = 1 << 20
ROW_QUANTUM = 128  # rows of a panel come in whole tiles
FUSED_WIDTH = 128
CLOSE = 1.05
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


MEANING = {
    "exp": "exponentials from the logits product's own epilogue, then two products",
    "chunk": "float32 logits by the library, two kernels over them, then two products",
    "dense": "every float32 logit by the library, one kernel that turns them into slopes, then two products",
    "fused": "no panel in memory, logits computed twice",
    "joint": "both directions from one panel of exponentials",
    "levels": "logits of all Matryoshka levels in one sweep over the tiles",
    "apart": "a sweep for every Matryoshka level",
}


@dataclass(frozen=True)
class Way:
    """One way to compute a direction: rows of a panel, predicted seconds and pieces, or the reason why it cannot be had.

    tile: rows and columns of the logits product's tile, where it is a kernel of ours.
    """

    path: str
    rows: int = 0
    seconds: float = float("inf")
    pieces: tuple[roofline.Piece, ...] = ()
    reason: str = ""
    scratch: int = 0
    tile: tuple[int, int] | None = None

    @classmethod
    def priced(cls, path: str, rows: int, pieces, scratch: int, tile: tuple[int, int] | None = None) -> Way:
        return cls(path, rows, roofline.predicted(pieces), tuple(pieces), scratch=scratch, tile=tile)

    def figures(self) -> str:
        """Where the seconds are: device, host and launches."""
        device, host = roofline.seconds(self.pieces) * 1e3, roofline.host_seconds(self.pieces) * 1e3
        return (
            f"{self.seconds * 1e3:.3f} ms ({device:.3f} on the device, {host:.3f} of the host), {roofline.launches(self.pieces)} launches"
        )


@dataclass(frozen=True)
class Plan:
    """The way that was chosen, the others, and what it was chosen for."""

    chosen: Way
    ways: tuple[Way, ...]
    title: str
    limit: float  # seconds of three bare library products, for one direction or from one panel for both
    rival: float = 0.0  # seconds of plain torch through autograd, 0 where it was not priced
    special: str = ""  # why the warp-specialised panel of triton/kernels/warp_specialised.py is not taken

    @property
    def path(self) -> str:
        return self.chosen.path

    @property
    def rows(self) -> int:
        return self.chosen.rows

    def text(self) -> str:
        """For a person: the choice, its pieces with what each is bound by, and what the other ways would take."""
        chosen = self.chosen
        tile = f", tiles of {chosen.tile[0]} x {chosen.tile[1]}" if chosen.tile else ""
        lines = [
            self.title,
            f"  {chosen.path}: {MEANING[chosen.path]}",
            f"  {chosen.rows} rows at a time{tile}, {chosen.scratch / MIB:.1f} MiB of scratch",
            "",
        ]
        lines += ["    " + piece.line() for piece in chosen.pieces]
        device, host = roofline.seconds(chosen.pieces), roofline.host_seconds(chosen.pieces)
        lines += [f"    {'on the device, together':<35}{device * 1e3:>58.3f} ms"]
        lines += [f"    {f'the host, {roofline.launches(chosen.pieces)} launches':<35}{host * 1e3:>58.3f} ms, beside it"]
        lines += [
            f"    {'the bare products by the library':<35}{self.limit * 1e3:>58.3f} ms: {chosen.seconds / self.limit:.3f} times that",
            "",
        ]
        for way in self.ways:
            if way is not chosen:
                taken = (
                    f"{way.figures()}, {way.rows} rows at a time, {way.scratch / MIB:.1f} MiB"
                    if not way.reason
                    else f"cannot: {way.reason}"
                )
                lines.append(f"  not {way.path + ' ':<6}{taken}")
        if chosen.path in ("exp", "joint") and self.special:
            lines.append(f"  not warp_specialised: {self.special}")
        if self.rival:
            lines.append(f"  plain torch through autograd, every logit in memory: {self.rival * 1e3:.3f} ms")
        return "\n".join(lines)


def row_bytes(path: str, columns: int, width: int, itemsize: int) -> float:
    """Scratch bytes of one row of a panel: E, float32 logits on the chunk path, partial sums, and the products' rows."""
    if path == "fused":
        return 8 * width + 16
    if path == "dense":
        return columns * (4 + itemsize)
    return columns * (itemsize + (4 if path == "chunk" else 4 / 64)) + width * (4 + 2 * itemsize)


def panel_rows(rows: int, columns: int, width: int, itemsize: int, path: str, workspace: int) -> int:
    """Rows of a panel that fit in `workspace` bytes, whole tiles where there is room for one; 0 where not even a row fits."""
    count = int(workspace // row_bytes(path, columns, width, itemsize))
    if count >= rows:
        return rows
    return count if count < ROW_QUANTUM else count // ROW_QUANTUM * ROW_QUANTUM


def obstacle(path: str, dtype: str, width: int, smoothing: bool, normalize: bool, interpreted: bool, plain: bool = False) -> str:
    """Why a way cannot take a problem, or "". plain: no option but weights and the temperature's number."""
    if path == "chunk":
        return ""
    if path == "dense":
        return "" if plain and not smoothing and not normalize else "only a loss without options, of rows that are normalised already"
    if smoothing:
        return "label smoothing needs every logit next to its row's sum"
    if dtype in ("float32", "float64") and not interpreted:
        return f"{dtype} has no tensor cores here, the library's product is faster"
    if path == "exp" and dtype == "float16":
        return "float16 has no exponents for a fixed shift"
    if path == "fused" and width > FUSED_WIDTH:
        return f"D={width} is above {FUSED_WIDTH}: no room on the chip for whole rows and their accumulators"
    if path == "fused" and dtype == "float16" and normalize:
        return "float16 cannot hold exponentials times inverse norms"
    return ""


@functools.lru_cache(maxsize=256)
def _plan(
    rows,
    columns,
    width,
    dtype,
    workspace,
    gpu,
    smoothing,
    normalize,
    interpreted,
    d_query,
    d_target,
    symmetric,
    masks,
    bounded,
    best,
    plain,
) -> Plan:
    itemsize, ways, directions = ITEMSIZE[dtype], [], 2 if symmetric else 1
    if symmetric:
        ways.append(_joint(rows, columns, width, dtype, workspace, gpu, interpreted, d_query, d_target, normalize))
    for path in ("exp", "chunk", "fused", "dense"):
        reason = obstacle(path, dtype, width, smoothing, normalize, interpreted, plain and not symmetric and d_query and d_target)
        count = panel_rows(rows, columns, width, itemsize, path, workspace)
        if path == "dense" and not reason and count < rows:
            reason = "the workspace has no room for every logit"
        if not reason and count < 1:
            reason = f"one row needs {row_bytes(path, columns, width, itemsize) / MIB:.2f} MiB of scratch"
        if reason:
            ways.append(Way(path, reason=reason))
            continue
        priced, tile = dict(itemsize=min(itemsize, 4)), None
        wanted = dict(d_query=d_query, d_target=d_target, normalize=normalize)
        if path == "fused":
            pieces = roofline.fused_passes(gpu, rows, columns, width, **priced, **wanted)
        elif path == "dense":
            pieces = roofline.dense(gpu, rows, columns, width, **priced)
        else:
            if path == "exp":
                maximum = best or not (bounded or roofline.by_sums(count, columns, bounded, best))
                tile = configs.exp_panel_tile(gpu.arch, itemsize, columns, masks=masks, scale=normalize, row_max=maximum)
            pieces = roofline.panels(
                gpu, rows, columns, width, count, tile=tile or (128, 128), path=path, bounded=bounded, best=best, **priced, **wanted
            )
        scratch = int(count * row_bytes(path, columns, width, itemsize))
        ways.append(Way.priced(path, count, tuple(pieces) * directions, scratch, tile))
    # the interpreter is there to run the kernels
    possible = [way for way in ways if not way.reason and not (interpreted and way.path == "dense")]
    if not possible:
        need = min(row_bytes(way.path, columns, width, itemsize) for way in ways if "scratch" in way.reason)
        raise ValueError(
            f"workspace_mib: expected room for one row of {columns} exponentials ({need / MIB:.2f} MiB), "
            f"got {workspace / MIB:.2f} MiB; raise workspace_mib"
        )
    title = (
        f"{'both directions of ' if symmetric else ''}{rows} rows x {columns} candidates x D={width} {dtype} on {gpu.name}, "
        f"workspace {workspace / MIB:.1f} MiB; times are PREDICTED"
    )
    limit = roofline.three_gemms(gpu, rows, columns, width, itemsize=min(itemsize, 4))
    # prices closer than the model can tell apart: the way with the least scratch
    near = [way for way in possible if way.seconds <= CLOSE * min(other.seconds for other in possible)]
    rival = 0.0
    if not (masks or smoothing):  # of which there are as many ways to write as people
        rival = roofline.predicted(
            roofline.eager(gpu, rows, columns, width, itemsize=min(itemsize, 4), normalize=normalize) * directions, roofline.EAGER_CALL
        )
    return Plan(min(near, key=lambda way: (way.scratch, way.seconds)), tuple(ways), title, limit, rival, _special(gpu))


def _special(gpu: roofline.Gpu) -> str:
    if (gpu.arch, False) not in configs.WARP_SPECIALISED:
        return f"sm_{gpu.arch} copies no tiles by itself"
    if gpu.arch in configs.WARP_SPECIALISED_FASTER:
        return ""
    return "nobody has measured it here yet; `python -m bench gpu --parts profile` does, exp_panel(panel='warp_specialised') takes it"


def _joint(rows, columns, width, dtype, workspace, gpu, interpreted, d_query, d_target, normalize) -> Way:
    """The way that keeps one panel for both directions."""
    reason = obstacle("exp", dtype, width, False, False, interpreted)
    scratch = int(rows * row_bytes("exp", columns, width, ITEMSIZE[dtype]))
    if not reason and scratch > workspace:
        reason = f"the whole panel needs {scratch / MIB:.1f} MiB of scratch"
    if reason:
        return Way("joint", reason=reason)
    itemsize = min(ITEMSIZE[dtype], 4)
    tile = configs.exp_panel_tile(gpu.arch, itemsize, columns, scale=normalize, col_sum=True)
    pieces = roofline.joint(gpu, rows, width, itemsize=itemsize, tile=tile, d_query=d_query, d_target=d_target, normalize=normalize)
    return Way.priced("joint", rows, pieces, scratch, tile)


def plan(
    rows: int,
    columns: int,
    width: int,
    dtype,
    *,
    workspace: int,
    gpu: roofline.Gpu = roofline.H100,
    smoothing: bool = False,
    normalize: bool = False,
    interpreted: bool = False,
    d_query: bool = True,
    d_target: bool = True,
    symmetric: bool = False,
    masks: bool = False,
    bounded: bool | None = None,
    best: bool = False,
    plain: bool = False,
    explain: Callable[[str], object] | None = None,
) -> Plan:
    """Choose a way for one direction, or with `symmetric` for both.

    Args:
        rows, columns, width: anchors, candidates of all blocks together, D. dtype: of the inputs, a torch dtype or its name.
        workspace: bytes of scratch. gpu: what is priced. smoothing, normalize: whether these options are on.
        interpreted: the kernels run in the interpreter, which has no reason to avoid float32.
        d_query, d_target: gradients wanted.
        symmetric: price both directions, rows being pairs of columns: one panel for both against a sweep each.
        masks: ids, thresholds or column masks. bounded: no row has to be looked at again, by default where rows are normalised here.
        best: statistics are wanted. plain: the loss has no option but weights and a temperature that is a number.
        explain: called with the plan as text, `print` for instance.

    Returns: `Plan`; the same arguments give the same plan.
    Raises: ValueError where the workspace has no room for a single row.
    """
    chosen = _plan(
        rows,
        columns,
        width,
        str(dtype).removeprefix("torch."),
        int(workspace),
        gpu,
        bool(smoothing),
        bool(normalize),
        interpreted,
        d_query,
        d_target,
        bool(symmetric),
        bool(masks),
        bool(normalize if bounded is None else bounded),
        bool(best),
        bool(plain),
    )
    if explain is not None:
        explain(chosen.text())
    return chosen


def plan_levels(
    rows: int,
    columns: int,
    dims: tuple[int, ...],
    dtype,
    *,
    workspace: int,
    gpu: roofline.Gpu = roofline.H100,
    smoothing: bool = False,
    interpreted: bool = False,
    reason: str = "",
    explain: Callable[[str], object] | None = None,
) -> Plan:
    """Matryoshka: one sweep over the tiles for all `dims` ("levels") against a sweep each ("apart"), one direction.

    reason: what keeps the levels from one sweep, "" for nothing. The rest as for `plan`.
    """
    name = str(dtype).removeprefix("torch.")
    itemsize = ITEMSIZE[name]
    each = [
        plan(rows, columns, dim, name, workspace=workspace, gpu=gpu, smoothing=smoothing, normalize=True, interpreted=interpreted)
        for dim in dims
    ]
    apart = Way(
        "apart",
        min(p.rows for p in each),
        sum(p.chosen.seconds for p in each),
        tuple(x for p in each for x in p.chosen.pieces),
        scratch=max(p.chosen.scratch for p in each),
    )
    count = panel_rows(rows, columns * len(dims), max(dims), itemsize, "exp", workspace)
    if not reason and count < 1:
        reason = "the workspace has no room for a row of every level"
    if reason:
        together = Way("levels", reason=reason)
    else:
        tile = configs.exp_panel_tile(gpu.arch, itemsize, columns, levels=True)
        pieces = roofline.levels(gpu, rows, columns, dims, count, itemsize=min(itemsize, 4), tile=tile)
        together = Way.priced("levels", count, pieces, int(count * row_bytes("exp", columns * len(dims), max(dims), itemsize)), tile)
    title = (
        f"{rows} rows x {columns} candidates x D={list(dims)} {name} on {gpu.name}, workspace {workspace / MIB:.1f} MiB; "
        "times are PREDICTED"
    )
    limit = sum(roofline.three_gemms(gpu, rows, columns, dim, itemsize=min(itemsize, 4)) for dim in dims)
    chosen = Plan(min((together, apart), key=lambda way: way.seconds), (together, apart), title, limit)
    if explain is not None:
        explain(chosen.text())
    return chosen


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m contrastive_kernels.dispatch", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--columns", type=int, required=True)
    parser.add_argument("--width", type=int)
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(ITEMSIZE))
    parser.add_argument("--gpu", default="h100", choices=sorted(roofline.GPUS))
    parser.add_argument("--workspace-mib", type=float, default=8192, help="scratch; the default on a GPU is 10 %% of its free memory")
    parser.add_argument("--normalize", action="store_true", help="rows are normalised on the fly, as the trainer does")
    parser.add_argument("--masks", action="store_true", help="ids, margins or column masks")
    parser.add_argument("--smoothing", action="store_true", help="label smoothing is on")
    parser.add_argument("--symmetric", action="store_true", help="both directions")
    parser.add_argument("--dims", type=int, nargs="+", help="Matryoshka levels, ascending, in place of --width; one direction")
    args = parser.parse_args(argv)
    if (args.width is None) == (args.dims is None) or (args.dims and args.symmetric):
        parser.error("expected one of --width and --dims, and --symmetric with --width alone")
    shared = dict(workspace=int(args.workspace_mib * MIB), gpu=roofline.GPUS[args.gpu], smoothing=args.smoothing, explain=print)
    if args.dims:
        reason = obstacle("exp", args.dtype, args.dims[-1], args.smoothing, True, False)
        plan_levels(args.rows, args.columns, tuple(args.dims), args.dtype, reason=reason, **shared)
    else:
        plain = not (args.normalize or args.masks or args.symmetric)
        plan(
            args.rows,
            args.columns,
            args.width,
            args.dtype,
            symmetric=args.symmetric,
            normalize=args.normalize,
            masks=args.masks,
            plain=plain,
            **shared,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
