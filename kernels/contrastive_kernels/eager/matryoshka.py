"""Matryoshka in plain torch: all levels from one sweep over the tiles, 6 N M D FLOP whatever their number.

Rows come normalised over the widest level, so that its cosines are the products themselves. Cosines of prefixes share these:
raw_k = raw_(k-1) + q[d_(k-1):d_k] . t[d_(k-1):d_k], and cos_k = raw_k / (|q_:k| |t_:k|). So do gradients: with W_k = d loss / d cos_k the
columns of segment k of both matrices need the sum of W_l / (|q_:l| |t_:l|) over the levels l >= k, formed from the widest level down. The
normalisation's own term is A_l,i = sum of W_l cos_l over a row (a column) times the prefix:

    d q_i[segment s] = sum over l >= s of ( sum_j W_l,ij t_j / (|q_i:l| |t_j:l|)  -  q_i A_l,i / |q_i:l|^2 )

Of the narrower levels A is summed pair by pair, from the logits and their exponentials; all levels' together is the product of row and
gradient, which gives the widest level's, to the rounding of all of them: a widest level that has nothing to learn leaves its own columns
with rounding of the others' size, 1e-7 of the row's gradient in float32. Legend: r rows of a panel, c columns of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..core.gradients import Computed
from ..core.matryoshka import level_weights
from ..core.operands import Operand, scatter_rows
from ..core.problem import build, directions, own_columns
from ..core.softmax import RowSums, finish, mask_logits, row_factor
from ..stats import row_sums
from .gemm import RowSum, add_product, operand_of, packed, prefers_onednn, product_into, transpose_into
from .scratch import scratch
from .sweep import PRODUCT_COLUMNS, TILE_COLUMNS, ColumnTile, logits_are_safe, panel_rows, tiles

SPARE = 1 << 17  # elements that a thread works on at a time: with two planes of them 1.5 MiB
ROWS = 256  # of either matrix that are worked on at a time outside of the sweep
# In place of a dropped pair's product: divided by the norms of prefixes it stays finite, and its exponential is 0.
DROPPED = -1e19
NOTHING = -1e10  # no logit is below it but those of dropped pairs
LEAST_NORM, MOST_NORM, LEAST_SCALE = 1e-3, 1e6, 1e-3


class LevelSweep:
    """One width: its problem, its single direction, its running sums."""

    def __init__(self, query, target, dim: int, options, weight: float, backend):
        self.dim, self.weight = dim, weight
        self.problem = build(query[:, :dim], target[:, :dim], options, backend)
        (self.direction,) = directions(self.problem, *own_columns(self.problem))
        (self.block,) = self.direction.blocks
        self.want_best = options.return_stats
        self.logit = self.direction.positive * self.problem.inverse_temperature
        self.sums = RowSums.empty(len(query), self.problem.dtype, query.device, False)
        self.sums.shift.zero_()
        # 1 / |prefix|: of the rows as passed, and from `shared_levels` on of rows that are normalised over the widest level
        self.query_norm, self.target_norm = self.problem.query.inverse_norm, self.problem.target.inverse_norm


def shared_levels(query, target, options, levels, backend) -> list[LevelSweep] | None:
    """The levels, narrowest first, where one sweep can make them; None where each needs its own.

    `levels` holds pairs (width, options of that level), in the order of `options.matryoshka_weights`.
    """
    if query.device.type != "cpu" or len({dim for dim, _ in levels}) < len(levels) or options.obstacle("shared_levels"):
        return None
    shared = [LevelSweep(query, target, d, o, w, backend) for (d, o), w in zip(levels, level_weights(options))]
    shared.sort(key=lambda level: level.dim)
    for level in shared:
        inverse = torch.stack([x for norms in (level.query_norm, level.target_norm) for x in norms.aminmax()])
        # a prefix without direction has a gradient of 0 on its own side alone: one matrix for both sides cannot say so
        if not logits_are_safe(level.problem, level.direction) or inverse.max() > 1 / LEAST_NORM or inverse.min() < 1 / MOST_NORM:
            return None
        if level.block.scale < LEAST_SCALE:
            return None
    return shared


class Cut(NamedTuple):
    """Some columns of a panel, few enough to stay in the cache: (columns, rows) each, by level where there are several."""

    raw: torch.Tensor
    spare: torch.Tensor
    planes: list[torch.Tensor]
    norms: list[torch.Tensor]  # (columns, 1)
    sums: list[torch.Tensor]  # (columns,) of W cos


class Sweep:
    """Buffers of all levels and the walk over panels and tiles.

    A plane is (columns, rows of a panel): logits of one level, exponentials of the widest one. Pairs that are no candidates are
    dropped once for all levels: their product is DROPPED, which stays far below every logit through the sums and scales that follow.
    """

    def __init__(self, query, target, levels: list[LevelSweep], wanted: frozenset[str], workspace: int):
        first, widest = levels[-1].problem, levels[-1]
        self.levels, self.wanted, self.dtype = levels, wanted, first.dtype
        self.rows, self.columns, width = len(query), len(target), widest.dim
        self.query_norm, self.target_norm = widest.query_norm, widest.target_norm  # of the rows as passed
        for level in levels:
            level.query_norm, level.target_norm = level.query_norm / self.query_norm, level.target_norm / self.target_norm
        self.query = Operand(query[:, :width], self.dtype, None, first.options.query_mask)
        self.target = Operand(target[:, :width], self.dtype, None, first.options.target_mask)
        self.candidates = Operand(target[:, :width], self.dtype, self.target_norm, first.options.target_mask)
        item = self.dtype.itemsize
        # products of all columns at once, where the library likes them so and a copy of the columns finds room
        joined = not prefers_onednn(self.dtype, query.device) and 4 * self.columns * width * item <= workspace
        self.tiles = tiles([levels[0].block], PRODUCT_COLUMNS if joined else TILE_COLUMNS)
        tallest = self.tiles[0].width
        self.across = scratch(self.columns * width, self.dtype, query.device).view(width, self.columns) if joined else None
        for start in range(0, self.columns if joined else 0, ROWS):
            stop = min(start + ROWS, self.columns)
            transpose_into(self.across[:, start:stop], self.candidates.tile(start, stop))
        self.stretches = [(0, self.columns)] if joined else [(tile.start, tile.stop) for tile in self.tiles]
        plane_columns = self.columns if wanted else 0
        # a row: its planes or their sum, a product that oneDNN makes anew, masks of a tile, copies of its anchors and their gradients
        tall = (not wanted) + prefers_onednn(self.dtype, query.device)
        row = (plane_columns * len(levels) + tall * tallest + 6 * width) * item + 2 * tallest
        spare = min(SPARE * torch.get_num_threads(), workspace // (8 * item))
        fixed = (spare + (self.columns * width if joined else 3 * tallest * width)) * item
        self.size = panel_rows(self.rows, row, fixed, workspace)
        self.planes = [scratch(self.size * plane_columns, self.dtype, query.device) for _ in levels]
        self.sum = None if wanted else scratch(self.size * tallest, self.dtype, query.device)
        self.spare = torch.empty(max(spare, self.size), dtype=self.dtype)
        edges = [0, *(level.dim for level in levels)]
        self.segments = [slice(a, b) for a, b in zip(edges, edges[1:])]
        self.d_query = torch.empty(self.rows, width, dtype=self.dtype) if "query" in wanted or "temperature" in wanted else None
        self.d_target, self.whole = None, None
        if "target" in wanted and self.columns * width * item <= workspace:
            # by segment, joined in the end: torch.mm takes twice as long to write few columns of a wider matrix
            self.d_target = [torch.empty(self.columns, s.stop - s.start, dtype=self.dtype) for s in self.segments]
        elif "target" in wanted:
            self.whole = torch.empty(self.columns, width, dtype=self.dtype)
            self.d_target = [self.whole[:, segment] for segment in self.segments]
        # sums of W cos over each row's columns, and over each column's rows of all but the widest level
        self.along_rows = [torch.zeros(self.rows, dtype=self.dtype) for _ in levels]
        self.along_columns = [torch.zeros(self.columns, dtype=self.dtype) for _ in levels[:-1]]

    def run(self) -> None:
        rows, cuts = 0, []
        for start in range(0, self.rows, self.size):
            stop = min(start + self.size, self.rows)
            anchors = self.query.tile(start, stop) * self.query_norm[start:stop, None]
            scaled = anchors * self.levels[-1].block.scale
            scaled = [packed(scaled[:, segment], self.tiles[0].width) for segment in self.segments]
            if stop - start != rows:
                rows = stop - start
                cuts = [self.cut(tile, rows) for tile in self.tiles]
            for tile, some in zip(self.tiles, cuts):
                self.fill(tile, some, scaled, start, stop)
            if self.wanted:
                self.products([[x for some in cuts for x in some]] if len(self.stretches) == 1 else cuts, anchors, start, stop)

    def plane(self, which: int, rows: int) -> torch.Tensor:
        """(columns, rows) logits or exponentials of one level."""
        return self.planes[which][: self.columns * rows].view(self.columns, rows)

    def raw(self, tile: ColumnTile, rows: int) -> torch.Tensor:
        """(columns of the tile, rows): where its products are summed. The widest level's logits take their place."""
        if self.wanted:
            return self.plane(len(self.levels) - 1, rows)[tile.start : tile.stop]
        return self.sum[: tile.width * rows].view(tile.width, rows)

    def cut(self, tile: ColumnTile, rows: int) -> list[Cut]:
        """Views for each stretch of the tile's columns: making them anew would take as long as an operator."""
        cuts, size = [], max(1, len(self.spare) // rows)
        for a in range(tile.start, tile.stop, size):
            b = min(a + size, tile.stop)
            spare = self.spare[: (b - a) * rows].view(b - a, rows)
            planes = [self.plane(which, rows)[a:b] if self.wanted else spare for which in range(len(self.levels))]
            norms = [level.target_norm[a:b, None] for level in self.levels]
            sums = [along[a:b] for along in self.along_columns]
            cuts.append(Cut(self.raw(tile, rows)[a - tile.start : b - tile.start], spare, planes, norms, sums))
        return cuts

    def fill(self, tile: ColumnTile, cuts: list[Cut], scaled, start: int, stop: int) -> None:
        """Every level's logits of a tile, and the sums of their exponentials."""
        rows, raw, widest = slice(start, stop), self.raw(tile, stop - start), len(self.levels) - 1
        candidates = self.candidates.tile(tile.start, tile.stop) if self.across is None else self.across[:, tile.start : tile.stop].T
        for which, (level, segment) in enumerate(zip(self.levels, self.segments)):
            (add_product if which else product_into)(raw, candidates[:, segment], scaled[which])
            direction = level.direction
            if which == 0:
                mask_logits(raw.T, tile.block, rows, None, direction.active, tile.dead, DROPPED)
            by_row, total = level.query_norm[rows], level.sums.total[rows]
            for cut in cuts:
                logits = cut.raw
                if which < widest:
                    logits = torch.mul(cut.raw, cut.norms[which], out=cut.planes[which]).mul_(by_row)
                if direction.threshold is not None:
                    logits.masked_fill_(logits > direction.threshold[rows] * level.block.scale, DROPPED)
                if level.want_best:
                    best = logits.amax(0)
                    best = torch.where(best <= NOTHING, float("-inf"), best / level.block.scale)
                    level.sums.best[rows] = torch.maximum(level.sums.best[rows], best)
                # not by a product with ones: it adds one by one, and small terms to a large sum are lost
                total += torch.exp(logits, out=cut.spare if which < widest else logits).sum(0)

    def products(self, cuts: list[list[Cut]], anchors, start: int, stop: int) -> None:
        """Gradients of one panel of rows, widest level first; its plane becomes the sum of the levels' slopes."""
        rows, count = slice(start, stop), stop - start
        pulled = RowSum(count, self.query.width, anchors, transposed=True) if self.d_query is not None else None
        slopes = self.plane(len(self.levels) - 1, count)
        for which in reversed(range(len(self.levels))):
            level, segment = self.levels[which], self.segments[which]
            factor = row_factor(level.sums.rows(rows), level.logit[rows], torch.zeros_like(level.logit[rows]))
            factor = factor * level.direction.weight[rows] * (level.problem.inverse_temperature * level.weight)
            across = operand_of(anchors[:, segment], self.tiles[0].width) if self.d_target is not None else None
            for stretch, some in zip(self.stretches, cuts):
                self.add_slopes(which, some, factor, rows)
                columns = slice(*stretch)
                if pulled is not None:
                    pulled.add(slopes[columns].T, self.candidates_across(segment, *stretch), segment)
                if self.d_target is not None:
                    (add_product if start else product_into)(self.d_target[which][columns], slopes[columns], across)
        if pulled is not None:
            pulled.copy_to(self.d_query[rows])
            for a in range(start, stop, ROWS):
                some = slice(a, min(a + ROWS, stop))
                joined = torch.linalg.vecdot(self.d_query[some], anchors[a - start : some.stop - start])
                self.along_rows[-1][some] = joined - sum(along[some] for along in self.along_rows[:-1])

    def candidates_across(self, segment: slice, start: int, stop: int) -> torch.Tensor:
        """(width of the segment, columns)."""
        if self.across is not None:
            return self.across[segment, start:stop]
        return self.candidates.narrow(segment.start, segment.stop).tile(start, stop).T.contiguous()

    def add_slopes(self, which: int, cuts: list[Cut], factor, rows: slice) -> None:
        """slopes (columns, rows) += W / (|q| |t|) of one level, and the sums of W cos; the widest level's plane holds the slopes."""
        level, widest = self.levels[which], len(self.levels) - 1
        if which == widest:
            for cut in cuts:
                cut.planes[widest].mul_(factor)
            return
        by_row, per_cosine, along_rows = factor * level.query_norm[rows], factor / level.block.scale, torch.zeros_like(factor)
        for cut in cuts:
            exponentials = torch.exp(cut.planes[which], out=cut.spare)
            weighted = cut.planes[which].mul_(exponentials)  # by its own logit; 0 where a pair is dropped
            if self.d_query is not None:
                along_rows += weighted.sum(0)
            if self.d_target is not None:
                cut.sums[which].addmv_(weighted, per_cosine)
            cut.planes[widest].addcmul_(exponentials.mul_(by_row), cut.norms[which])
        self.along_rows[which][rows].addcmul_(along_rows, per_cosine)


def compute(query, target, levels: list[LevelSweep], wanted: frozenset[str], workspace: int) -> Computed:
    """All levels together, weights included; what is not wanted is None."""
    sweep = Sweep(query, target, levels, wanted, workspace)
    sweep.run()
    loss, stats = 0.0, None
    results = [finish(level.sums, level.logit, 0.0) for level in levels]
    for level, result in zip(levels, results):
        weight = level.direction.weight
        loss = loss + level.weight * torch.where(weight != 0, weight * result.loss, 0)
        if level.want_best:
            stats = row_sums(level.problem.active, result.lse, level.direction.positive, level.sums.best)
    loss = loss if levels[0].problem.options.reduction == "none" else loss.sum()
    if not wanted:
        return Computed(loss, stat_sums=stats)
    sweep.planes = sweep.across = None
    _add_positives(sweep, results)
    d_query = d_target = d_temperature = None
    if sweep.d_query is not None:
        parts, norms = [sweep.d_query[:, segment] for segment in sweep.segments], [level.query_norm for level in levels]
        _project(parts, sweep.d_query, sweep.query, sweep.query_norm, norms, sweep.along_rows)
        if "temperature" in wanted:
            d_temperature = -sum(along.sum() for along in sweep.along_rows) * levels[0].problem.inverse_temperature
        d_query = _padded(sweep.d_query, query) if "query" in wanted else None
    if sweep.d_target is not None:
        d_target = torch.empty(sweep.columns, levels[-1].dim, dtype=sweep.dtype) if sweep.whole is None else sweep.whole
        _project(sweep.d_target, d_target, sweep.target, sweep.target_norm, [level.target_norm for level in levels], sweep.along_columns)
        sweep.d_target = None
        d_target = _padded(d_target, target)
    return Computed(loss, d_query, d_target, None, d_temperature, stats)


def _padded(gradient, like):
    """Zeros for the columns beyond the widest level."""
    if gradient is None or gradient.shape[1] == like.shape[1]:
        return gradient
    return torch.nn.functional.pad(gradient, (0, like.shape[1] - gradient.shape[1]))


def _add_positives(sweep: Sweep, results) -> None:
    """The positives' own terms, all levels of a segment at once."""
    problem = sweep.levels[0].problem
    positives, regular = problem.positives, problem.own_targets.index is None
    total = torch.zeros(sweep.rows, dtype=sweep.dtype)
    for which in reversed(range(len(sweep.levels))):
        level, segment = sweep.levels[which], sweep.segments[which]
        slope = results[which].positive * level.direction.weight * (level.problem.inverse_temperature * level.weight)
        with_cosine = slope * level.direction.positive
        sweep.along_rows[which] += with_cosine
        if which < len(sweep.levels) - 1:
            sweep.along_columns[which].index_add_(0, positives, with_cosine)
        total = total + slope * level.query_norm * level.target_norm[positives]
        query, target = (side.narrow(segment.start, segment.stop) for side in (sweep.query, sweep.target))
        target = target.every(len(target.source) // sweep.rows, sweep.rows) if regular else target.gathered(positives)
        to_query, to_target = total * sweep.target_norm[positives], total * sweep.query_norm
        for start in range(0, sweep.rows, ROWS):
            rows = slice(start, min(start + ROWS, sweep.rows))
            if sweep.d_query is not None:
                sweep.d_query[rows, segment].addcmul_(target.tile(rows.start, rows.stop), to_query[rows, None])
            if sweep.d_target is None:
                continue
            pulled, out = query.tile(rows.start, rows.stop), sweep.d_target[which]
            if regular:
                problem.own_rows(out)[rows].addcmul_(pulled, to_target[rows, None])
            else:
                scatter_rows(out, positives[rows], pulled * to_target[rows, None])


def _project(parts, out, operand: Operand, own_norm, norms: list[torch.Tensor], along: list[torch.Tensor]) -> None:
    """From the gradient of the products, by segment, to that of the rows as passed.

    Takes off, of each prefix, what its normalisation takes off: A / |x|^2 times the prefix. `own_norm` is 1 / |x| over the
    widest level, `norms` what the other inverse norms are beside it; `along` may lack the widest level's A.
    """
    for first in range(0, operand.rows, ROWS):
        rows = slice(first, min(first + ROWS, operand.rows))
        inverse, stop, slices = own_norm[rows], 0, []
        xs = operand.tile(rows.start, rows.stop)
        for part in parts:
            start, stop = stop, stop + part.shape[1]
            slices.append((part[rows], xs[:, start:stop], out[rows, start:stop]))
        sums = [a[rows] for a in along]
        if len(sums) < len(slices):
            sums.append(sum(torch.linalg.vecdot(g, x) for g, x, _ in slices) * inverse - sum(sums))
        total = 0.0
        for (g, x, target), a, norm in reversed(list(zip(slices, sums, norms))):
            total = total + a * norm[rows].square()
            torch.mul(g.addcmul_(x, (total * inverse)[:, None], value=-1), inverse[:, None], out=target)
