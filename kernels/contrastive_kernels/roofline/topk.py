"""What the top-k kernel is predicted to take on a GPU: its product, its selection, and the merging of its shares.

    python -m bench aot        prints it with the instructions that the compiled kernel has

PREDICTED, with the rates and shares of roofline.py. How often a tile is looked through again is an expectation, for targets in random
order: after m of them the next one enters a row's list with probability k / m, and a tile is looked through as often as the row with
most newcomers in it has some. Targets in ascending order of every query's score would be the worst case, and far slower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import ISSUE_SHARE, LAUNCH, TRITON_SHARE, Gpu, Piece, rate

MERGE_LAUNCHES = 10  # sorts by index and by score, gathers


@dataclass(frozen=True)
class Selection:
    """The compiled kernel: instructions a thread issues for every tile, without and in each look through it.

    Args: rows, columns: of a tile. threads, blocks: of a program, and programs that a multiprocessor holds at a time.
        each_tile: with the product's own; each_look: once for every newcomer. resident: queries are read once.
    """

    rows: int
    columns: int
    threads: int
    blocks: int
    each_tile: float
    each_look: float
    resident: bool = True


def _at_least(count: int, mean: float) -> float:
    """P(Poisson(mean) >= count)."""
    below = math.exp(-mean) * sum(mean**i / math.factorial(i) for i in range(count))
    return max(0.0, 1.0 - below)


def looks(rows: int, columns: int, kept: int, targets: int) -> float:
    """Expected looks through all tiles of a split of `targets`: of each, the most newcomers that one of its rows has."""
    total, tile, tiles = 0.0, 0, -(-targets // columns)
    while tile < tiles:
        step = max(1, tile // 16)  # the further on, the slower it changes
        seen = (tile + step / 2) * columns
        mean, expected = kept * columns / max(seen, columns), 0.0
        for count in range(1, columns + 1):
            some = 1 - (1 - _at_least(count, mean)) ** rows
            expected += some
            if some < 1e-4:
                break
        total += expected * min(step, tiles - tile)
        tile += step
    return total


def topk(
    gpu: Gpu, queries: int, targets: int, width: int, kept: int, selection: Selection, splits: int, *, itemsize: int = 2
) -> list[Piece]:
    """The pieces of one search: the streaming kernel and the merging of its `splits`.

    Where a multiprocessor holds one program, selection adds to the product; where it holds more, one multiplies while another selects and
    the slower of the two counts.
    """
    tiles_r, tiles_c = -(-queries // selection.rows), -(-targets // selection.columns)
    tiles = tiles_r * tiles_c
    flops = 2 * queries * targets * width
    from_l2 = tiles * (selection.columns + (0 if selection.resident else selection.rows)) * width * itemsize
    read, written = itemsize * width * (queries + targets), 8 * queries * kept * splits
    product = max(flops / (rate(gpu, itemsize) * TRITON_SHARE), from_l2 / gpu.l2_bandwidth, (read + written) / gpu.bandwidth)
    instructions = (
        tiles * selection.each_tile
        + tiles_r * splits * looks(selection.rows, selection.columns, kept, -(-targets // splits)) * selection.each_look
    )
    select = instructions * selection.threads / (gpu.issue * ISSUE_SHARE)
    slots, programs = gpu.sms * selection.blocks, tiles_r * splits
    waves = -(-programs // slots) * slots / programs  # the last wave is as long as the others
    busy = (max(product, select) if selection.blocks > 1 else product + select) * waves
    entries = queries * kept * splits
    merge = 12 * entries * MERGE_LAUNCHES / gpu.bandwidth + MERGE_LAUNCHES * LAUNCH
    return [
        Piece("scores and their best", flops, read, written, busy + LAUNCH),
        Piece("merging the splits", 0, written, 12 * queries * kept, merge),
    ]
