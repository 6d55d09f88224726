"""One sweep over panels of rows, in plain torch: value and gradients in 6 N M D FLOP, never N x M.

A panel of R rows sees every candidate of its rows, so its softmax is complete when its products are formed:

    S = scale * A B^T   ->  E = exp(S - shift), sums  ->  dA = diag(a) (E B),  dB += E^T (diag(a) A),  a = w (1 - p_pos) / sum(E) / T

with a the row's factor folded into the smaller operand. Candidates come in tiles of some hundred columns: a tile is masked,
exponentiated and summed while it is in the cache. It is stored transposed, (columns, rows), since all three products then have
both of their large operands contiguous along the summed dimension (see gemm.py); code sees its (rows, columns) view. Scratch
is O(R (sum of columns) + R D), within the workspace.
"""

from __future__ import annotations

import dataclasses

import torch

from ..core.gradients import Gradients
from ..core.hard_negatives import HardNegatives
from ..core.problem import Block, Direction, Problem
from ..core.softmax import SAFE_LOGIT, RowSums, cut_negligible, finish, mask_logits, reduce_logits, row_factor
from .gemm import RowSum, packed, prefers_onednn, product_into
from .scratch import scratch

TILE_COLUMNS = 1024  # with 3,000 rows 12 MiB: near the cache, and large enough for oneDNN's products
PRODUCT_COLUMNS = 4096  # of one product where the library takes operands as they lie: 16,384 at once took MKL 3 to 5 % more
ALIGNED = 16  # rows: a cache line of float32
MIB = 1 << 20


@dataclasses.dataclass
class ColumnTile:
    """Columns [start, stop) of a block, which has `columns` in all.

    Args:
        block: the block with these columns alone. whole: with all of them.
        dead: indices of columns that are no candidates, known beforehand where that needs no wait for a GPU: a few columns are
            cheaper to fill than a whole mask is to apply.
    """

    block: Block
    start: int
    stop: int
    whole: Block
    dead: torch.Tensor | None

    @property
    def columns(self) -> int:
        return self.whole.width

    @property
    def width(self) -> int:
        return self.stop - self.start


def tiles(blocks: list[Block], width: int) -> list[ColumnTile]:
    """All blocks in tiles of at most `width` columns."""
    out = []
    for block in blocks:
        for start in range(0, block.width, width):
            stop = min(start + width, block.width)
            part = block if stop - start == block.width else block.narrow(start, stop)
            keep = part.columns.keep
            dead = None if keep is None or keep.is_cuda else (~keep).nonzero()[:, 0]
            out.append(ColumnTile(part, start, stop, block, dead))
    return out


def panel_rows(rows: int, each: int, fixed: int, workspace: int) -> int:
    """Rows of a panel when a row takes `each` bytes and `fixed` bytes are taken whatever their number."""
    room = max(workspace - fixed, workspace // 2)
    if room < each:
        raise ValueError(
            f"workspace_mib: expected room for one row of logits ({each / MIB:.2f} MiB, twice), "
            f"got {workspace / MIB:.2f} MiB; raise workspace_mib"
        )
    count = min(rows, room // each)
    equal = -(-rows // -(-rows // count))
    return min(-(-equal // ALIGNED) * ALIGNED, count)


def logits_are_safe(problem: Problem, direction: Direction) -> bool:
    """True when no logit can exceed SAFE_LOGIT; False too where knowing it would need a wait for a GPU."""
    if any(isinstance(block.scale, torch.Tensor) for block in direction.blocks) or problem.options.group is not None:
        return False
    scale = max(block.scale for block in direction.blocks)
    if scale > SAFE_LOGIT or problem.options.normalize:
        return scale <= SAFE_LOGIT * 0.999
    return problem.device.type == "cpu" and scale * problem.largest_product() <= SAFE_LOGIT


class PanelBuffers:
    """The buffer for the logits of one direction, and the walk over them.

    Args:
        keep: a panel's tiles are kept for products; else each takes the place of the one before.
    """

    def __init__(self, problem: Problem, direction: Direction, workspace: int, keep: bool):
        self.problem, self.direction, self.keep = problem, direction, keep
        self.smoothing = problem.options.label_smoothing
        dtype, device, width = problem.dtype, problem.device, problem.query.width
        widest = max(block.width for block in direction.blocks)
        self.tiles = tiles(direction.blocks, widest if device.type == "cuda" else TILE_COLUMNS)
        widest = max(tile.width for tile in self.tiles)
        buffer_columns = sum(tile.width for tile in self.tiles) if keep else widest
        anchors = len({id(block.anchors) for block in direction.blocks})
        # a row: its logits and their masks, a tile's temporaries, and the anchors' copies and gradients; beside them candidates' tiles
        row = (buffer_columns + 2 * widest + (2 + 3 * anchors) * width) * dtype.itemsize + (buffer_columns if self.smoothing else 0)
        self.rows = problem.query.rows
        self.size = panel_rows(self.rows, row, 3 * widest * width * dtype.itemsize, workspace)
        self.buffer = scratch(self.size * buffer_columns, dtype, device)
        self.joined = self._joined(direction.blocks) if keep else None

    def _joined(self, blocks: list[Block]) -> list[ColumnTile] | None:
        """Blocks in wide tiles, where products are formed of several tiles at once: nothing has to be prepared tile by tile."""
        if not all(block.columns.operand.plain for block in blocks) or prefers_onednn(self.problem.dtype, self.problem.device):
            return None
        return tiles(blocks, PRODUCT_COLUMNS)

    def __iter__(self):
        """(start, stop) of each panel."""
        return ((a, min(a + self.size, self.rows)) for a in range(0, self.rows, self.size))

    def anchors(self, start: int, stop: int) -> dict[int, torch.Tensor]:
        """Rows [start, stop) of every block's anchors, by identity."""
        return {id(block.anchors): block.anchors.tile(start, stop) for block in self.direction.blocks}

    def fill(self, anchors, start: int, stop: int):
        """(tile, its masked logits of rows [start, stop)), one after another."""
        first, rows, ready = 0, stop - start, 0
        scaled = {}  # the smaller operand carries the scale
        for tile in self.tiles:
            block = tile.block
            key = id(block.anchors), block.scale
            if key not in scaled:
                scaled[key] = packed(anchors[id(block.anchors)] * block.scale, tile.width)
            out = self.buffer[first * rows : (first + tile.width) * rows].view(tile.width, rows)
            if self.joined is None:
                product_into(out, block.columns.operand.tile(0, tile.width), scaled[key])
            elif first >= ready:  # the tiles behind it in the same product
                ready = first + min(PRODUCT_COLUMNS, tile.columns - tile.start)
                several = self.buffer[first * rows : ready * rows].view(ready - first, rows)
                columns = tile.whole.columns.operand.tile(tile.start, tile.start + ready - first)
                product_into(several, columns, scaled[key])
            first += tile.width if self.keep else 0
            mask_logits(out.T, block, slice(start, stop), self.direction.threshold, self.direction.active, tile.dead)
            yield tile, out.T

    def wide_parts(self, rows: int):
        """(rows, columns) of each wide tile: its tiles lie one behind the other."""
        first = 0
        for tile in self.joined:
            yield self.buffer[first * rows : (first + tile.width) * rows].view(tile.width, rows).T
            first += tile.width

    def products(self, parts, anchors, start: int, stop: int, factor, gradients: Gradients) -> None:
        """dA = diag(factor) (E B) and dB += E^T (diag(factor) A), for all tiles of one panel."""
        width, rows = self.problem.query.width, stop - start
        tiles = self.tiles
        if self.joined is not None:
            tiles, parts = self.joined, self.wide_parts(rows)
        pulled, scaled, sinks = {}, {}, {}
        for tile, part in zip(tiles, parts):
            block, key = tile.block, id(tile.block.anchors)
            if gradients.wants(block.anchor_sink) or gradients.wants("temperature"):
                if key not in pulled:
                    pulled[key], sinks[key] = RowSum(rows, width, part), block.anchor_sink
                pulled[key].add(part, pulled[key].operand(block.columns.operand.tile(0, tile.width)))
            if gradients.wants(block.columns.sink):
                if key not in scaled:
                    scaled[key] = packed((anchors[key] * factor[:, None]).T, tile.width)
                gradients.add_product(block.columns.sink, tile.columns, tile.start, part.T, scaled[key])
        scaled.clear()
        for key, total in pulled.items():
            d_anchors = total.result().mul_(factor[:, None])
            if gradients.wants("temperature"):
                gradients.add_temperature(torch.linalg.vecdot(d_anchors, anchors[key]), slice(start, stop))
            if gradients.wants(sinks[key]):
                gradients.add_anchors(sinks[key], start, stop, d_anchors)


def smooth(part, dropped, factor, candidate_share) -> None:
    """E becomes the derivative with respect to the logits: factor * E - share, over the candidates."""
    torch.addcmul(candidate_share.neg()[:, None], part, factor[:, None], out=part)
    if dropped is not None:
        part.masked_fill_(dropped, 0)


def sweep(problem: Problem, direction: Direction, hard: HardNegatives | None, gradients: Gradients | None, workspace: int, want_best: bool):
    """Reduce every row of `direction` and add its gradients. Returns (RowResult, RowSums) of all rows, (n,) each."""
    n, smoothing = problem.query.rows, problem.options.label_smoothing
    safe = logits_are_safe(problem, direction)
    panels = PanelBuffers(problem, direction, workspace, keep=gradients is not None)
    sums = RowSums.empty(n, problem.dtype, problem.device, bool(smoothing))
    if hard is not None:
        sums.add(slice(0, n), hard.sums)
    logit = direction.positive * problem.inverse_temperature
    for start, stop in panels:
        rows, anchors = slice(start, stop), panels.anchors(start, stop)
        parts, shifts, masks = [], [], []
        for tile, part in panels.fill(anchors, start, stop):
            reduced, dropped = reduce_logits(part, tile.block.scale, safe, bool(smoothing), want_best)
            sums.add(rows, reduced)
            parts.append(part)
            shifts.append(reduced.shift)
            masks.append(dropped)
        if gradients is None:
            continue
        row_sums, weight = sums.rows(rows), direction.weight[rows]
        common = torch.zeros_like(row_sums.shift) if safe else torch.where(row_sums.shift == float("-inf"), 0, row_sums.shift)
        factor = row_factor(row_sums, logit[rows], common) * weight
        if not safe:
            for part, shift in zip(parts, shifts):
                shift = shift - common  # -inf for a tile without candidates, whose zeros stay
                cut_negligible(shift)
                part.mul_(shift.exp_()[:, None])
        if smoothing:
            candidate_share = weight * finish(row_sums, logit[rows], smoothing).smooth
            for part, dropped in zip(parts, masks):
                smooth(part, dropped, factor, candidate_share)
            factor = torch.ones_like(factor)
        panels.products(parts, anchors, start, stop, factor * problem.inverse_temperature, gradients)
    result = finish(sums, logit, smoothing)
    if gradients is not None:
        gradients.add_positives(direction, result.positive * direction.weight * problem.inverse_temperature)
    return result, sums
