"""Matryoshka in plain torch: all levels from one sweep over the tiles, 6 N M D FLOP whatever their number.

Cosines of prefixes share their products: raw_k = raw_(k-1) + q[d_(k-1):d_k] . t[d_(k-1):d_k], and cos_k = raw_k / (|q_:k| |t_:k|). So do
gradients: with W_k = d loss / d cos_k the columns of segment k of both matrices need the sum of W_l / (|q_:l| |t_:l|) over the levels l >= k,
formed from the widest level down. The normalisation's own term is the sum of W_k cos_k over a row (a column) times the prefix:

    d q_i[segment s] = sum over l >= s of ( sum_j W_l,ij t_j / (|q_i:l| |t_j:l|)  -  q_i sum_j W_l,ij cos_l,ij / |q_i:l|^2 )

and W cos comes from E alone, whose logarithm is the logit (the shift is 0 here). Elementwise work goes over stretches of columns that stay in the cache. Legend:
r rows of a panel, c columns of a tile.
"""

from __future__ import annotations

import torch

from contrastive_kernels.gemm import RowSum, add_product, prefers_onednn, product_into, transposed
from contrastive_kernels.operands import Operand, scatter_rows
from contrastive_kernels.panels import PRODUCT_COLUMNS, TILE_COLUMNS, Tile, logits_are_safe, panel_rows, tiles
from contrastive_kernels.problem import build, directions, own_columns
from contrastive_kernels.scratch import scratch
from contrastive_kernels.softmax import RowSums, finish, mask_logits, row_factor
from contrastive_kernels.stats import row_sums

APART = ("symmetric", "query_negatives", "target_negatives", "label_smoothing")
SPARE = 1 << 20  # elements that are worked on at a time: 4 MiB, near enough for the caches of two cores
# In place of a dropped pair's product: whatever it is multiplied by below, it stays finite and its exponential is 0.
DROPPED = -1e25
NOTHING = -1e10  # no logit is below it but those of dropped pairs
LEAST_NORM, MOST_NORM, LEAST_SCALE = 1e-3, 1e6, 1e-3


class Level:
    """One width: its problem, its single direction, its running sums."""

    def __init__(self, query, target, dim: int, options, weight: float):
        self.dim, self.weight = dim, weight
        self.problem = build(query[:, :dim], target[:, :dim], options)
        (self.direction,) = directions(self.problem, *own_columns(self.problem))
        (self.block,) = self.direction.blocks
        self.want_best = options.return_stats
        self.logit = self.direction.positive * self.problem.inverse_temperature
        self.sums = RowSums.empty(len(query), self.problem.dtype, query.device, False)
        self.sums.shift.zero_()
        self.query_norm, self.target_norm = self.problem.query.inverse_norm, self.problem.target.inverse_norm


def together(query, target, options, levels) -> list[Level] | None:
    """The levels, narrowest first, where one sweep can make them; None where each needs its own.

    `levels` holds pairs (width, options of that level), in the order of `options.matryoshka_weights`.
    """
    if query.device.type != "cpu" or options.group is not None or options.hard_negatives is not None or len({d for d, _ in levels}) < len(levels):
        return None
    if any(getattr(options, name) for name in APART):
        return None
    weights = options.matryoshka_weights or (1.0,) * len(levels)
    made = sorted((Level(query, target, d, o, w) for (d, o), w in zip(levels, weights)), key=lambda level: level.dim)
    for level in made:
        inverse = torch.stack([x for norms in (level.query_norm, level.target_norm) for x in norms.aminmax()])
        # a prefix without direction has a gradient of 0 on its own side alone: one matrix for both sides cannot say so
        if not logits_are_safe(level.problem, level.direction) or inverse.max() > 1 / LEAST_NORM or inverse.min() < 1 / MOST_NORM:
            return None
        if level.block.scale < LEAST_SCALE:
            return None
    return made


class Sweep:
    """Buffers of all levels and the walk over panels and tiles.

    A plane holds the exponentials of one level, a panel's rows by all columns. Pairs that are no candidates are dropped once for
    all levels: their product is DROPPED, which stays far below every logit through the sums and scales that follow.
    """

    def __init__(self, query, target, levels: list[Level], wanted: frozenset[str], workspace: int):
        first = levels[-1].problem
        self.levels, self.wanted, self.dtype = levels, wanted, first.dtype
        self.rows, self.columns, width = len(query), len(target), levels[-1].dim
        self.query = Operand(query[:, :width], self.dtype, None, first.options.query_mask)
        self.target = Operand(target[:, :width], self.dtype, None, first.options.target_mask)
        whole = self.target.plain and not prefers_onednn(self.dtype, query.device)  # products of all columns at once
        self.tiles = tiles([levels[0].block], PRODUCT_COLUMNS if whole else TILE_COLUMNS)
        widest, item = self.tiles[0].width, self.dtype.itemsize
        self.stretches = [(0, self.columns)] if whole else [(tile.start, tile.stop) for tile in self.tiles]
        held = self.columns if wanted else 0
        row = (held * len(levels) + 2 * widest + 4 * width) * item
        fixed = SPARE * item + (0 if whole else 3 * widest * width * item)
        self.size = panel_rows(self.rows, row, fixed, workspace)
        self.planes = [scratch(self.size * held, self.dtype, query.device) for _ in levels]
        self.raw = scratch(self.size * widest, self.dtype, query.device)
        self.spare = torch.empty(max(SPARE, self.size), dtype=self.dtype)
        edges = [0, *(level.dim for level in levels)]
        self.segments = [slice(a, b) for a, b in zip(edges, edges[1:])]
        self.d_query = torch.empty(self.rows, width, dtype=self.dtype) if "query" in wanted or "temperature" in wanted else None
        self.d_target = torch.empty(self.columns, width, dtype=self.dtype) if "target" in wanted else None
        # sums of W cos over each row's columns and each column's rows
        self.along_rows = [torch.zeros(self.rows, dtype=self.dtype) for _ in levels]
        self.along_columns = [torch.zeros(self.columns, dtype=self.dtype) for _ in levels]

    def run(self) -> None:
        for start in range(0, self.rows, self.size):
            stop = min(start + self.size, self.rows)
            anchors = self.query.tile(start, stop)
            for tile in self.tiles:
                self.fill(tile, anchors, start, stop)
            if self.wanted:
                self.products(anchors, start, stop)

    def plane(self, which: int, rows: int) -> torch.Tensor:
        """(columns, rows) exponentials of one level."""
        return self.planes[which][: self.columns * rows].view(self.columns, rows)

    def cuts(self, start: int, stop: int, rows: int):
        """(a, b, spare (b - a, rows)) of stretches of columns that stay in the cache."""
        size = max(1, SPARE // rows)
        for a in range(start, stop, size):
            b = min(a + size, stop)
            yield a, b, self.spare[: (b - a) * rows].view(b - a, rows)

    def fill(self, tile: Tile, anchors, start: int, stop: int) -> None:
        """Logits of every level's tile, and the sums of their exponentials."""
        rows, count = slice(start, stop), stop - start
        raw = self.raw[: tile.width * count].view(tile.width, count)
        candidates = self.target.tile(tile.start, tile.stop)
        for which, (level, segment) in enumerate(zip(self.levels, self.segments)):
            (add_product if which else product_into)(raw, candidates[:, segment], anchors[:, segment])
            direction, scale = level.direction, level.block.scale
            if which == 0:
                mask_logits(raw.T, tile.block, rows, None, direction.active, tile.dead, DROPPED)
            by_row, total, plane = level.query_norm[rows] * scale, level.sums.total[rows], self.plane(which, count) if self.wanted else None
            for a, b, spare in self.cuts(tile.start, tile.stop, count):
                logits = torch.mul(raw[a - tile.start : b - tile.start], level.target_norm[a:b, None], out=spare).mul_(by_row)
                if direction.threshold is not None:
                    logits.masked_fill_(logits > direction.threshold[rows] * scale, DROPPED)
                if level.want_best:
                    best = logits.amax(0)
                    best = torch.where(best <= NOTHING, float("-inf"), best / scale)
                    level.sums.best[rows] = torch.maximum(level.sums.best[rows], best)
                total += torch.exp(logits, out=spare if plane is None else plane[a:b]).sum(0)

    def products(self, anchors, start: int, stop: int) -> None:
        """Gradients of one panel of rows, widest level first; its plane becomes the sum of the levels' slopes."""
        rows, count = slice(start, stop), stop - start
        pulled = RowSum(count, self.query.width, anchors)
        across = transposed(anchors, self.tiles[0].width) if self.d_target is not None else None
        slopes = self.plane(len(self.levels) - 1, count)
        for which in reversed(range(len(self.levels))):
            level, segment = self.levels[which], self.segments[which]
            factor = row_factor(level.sums.rows(rows), level.logit[rows], torch.zeros_like(level.logit[rows]))
            factor = factor * level.direction.weight[rows] * (level.problem.inverse_temperature * level.weight)
            for stretch in self.stretches:
                self.add_slopes(which, slopes, factor, rows, stretch)
                columns = slice(*stretch)
                if self.d_query is not None:
                    candidates = self.target.narrow(segment.start, segment.stop).tile(*stretch)
                    pulled.add(slopes[columns].T, pulled.operand(candidates), segment)
                if self.d_target is not None:
                    (add_product if start else product_into)(self.d_target[columns, segment], slopes[columns], across[segment])
        if self.d_query is not None:
            self.d_query[rows] = pulled.result()

    def add_slopes(self, which: int, slopes, factor, rows: slice, stretch: tuple[int, int]) -> None:
        """slopes (columns, rows) += W / (|q| |t|) of one level in a stretch of columns, and the sums of W cos."""
        level, count = self.levels[which], rows.stop - rows.start
        widest, plane = which == len(self.levels) - 1, self.plane(which, count)
        least = torch.finfo(self.dtype).tiny
        by_row, per_cosine = factor * level.query_norm[rows], factor / level.block.scale
        along_rows, along_columns = self.along_rows[which][rows], self.along_columns[which]
        for a, b, spare in self.cuts(*stretch, count):
            part = plane[a:b]
            weighted = torch.clamp(part, min=least, out=spare).log_().mul_(part)  # E times its logit, 0 where E is
            along_rows.addcmul_(weighted.sum(0), per_cosine)
            along_columns[a:b].addmv_(weighted, per_cosine)
            part.mul_(by_row)
            if widest:
                part.mul_(level.target_norm[a:b, None])
            else:
                slopes[a:b].addcmul_(part, level.target_norm[a:b, None])


def compute(query, target, levels: list[Level], wanted: frozenset[str], workspace: int):
    """(loss, d_query, d_target, d_temperature, stat_sums) of all levels together, weights included; what is not wanted is None."""
    sweep = Sweep(query, target, levels, wanted, workspace)
    sweep.run()
    loss, stats, d_temperature = 0.0, None, 0.0
    results = [finish(level.sums, level.logit, 0.0) for level in levels]
    for level, result in zip(levels, results):
        weight = level.direction.weight
        loss = loss + level.weight * torch.where(weight != 0, weight * result.loss, 0)
        if level.want_best:
            stats = row_sums(level.problem.kept, result.lse, level.direction.positive, level.sums.best)
    loss = loss if levels[0].problem.options.reduction == "none" else loss.sum()
    if not wanted:
        return loss, None, None, None, stats
    _add_positives(sweep, results)
    for which, level in enumerate(levels):
        d_temperature = d_temperature - sweep.along_rows[which].sum() * level.problem.inverse_temperature
    _project(sweep)
    grown = [_padded(sweep.d_query if "query" in wanted else None, query), _padded(sweep.d_target, target)]
    return loss, *grown, d_temperature if "temperature" in wanted else None, stats


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
        sweep.along_columns[which].index_add_(0, positives, with_cosine)
        total = total + slope * level.query_norm * level.target_norm[positives]
        query, target = (side.narrow(segment.start, segment.stop) for side in (sweep.query, sweep.target))
        target = target.every(len(target.source) // sweep.rows, sweep.rows) if regular else target.gathered(positives)
        step = max(1, (4 << 20) // query.width)
        for start in range(0, sweep.rows, step):
            rows = slice(start, min(start + step, sweep.rows))
            if sweep.d_query is not None:
                sweep.d_query[rows, segment].addcmul_(target.tile(rows.start, rows.stop), total[rows, None])
            if sweep.d_target is None:
                continue
            pulled, out = query.tile(rows.start, rows.stop), sweep.d_target[:, segment]
            if regular:
                problem.own_rows(out)[rows].addcmul_(pulled, total[rows, None])
            else:
                scatter_rows(out, positives[rows], pulled * total[rows, None])


def _project(sweep: Sweep) -> None:
    """Take off what the normalisation of each prefix takes off: (sum of W cos) / |x|^2 times the prefix."""
    for gradient, operand, sums, norms in (
        (sweep.d_query, sweep.query, sweep.along_rows, [level.query_norm for level in sweep.levels]),
        (sweep.d_target, sweep.target, sweep.along_columns, [level.target_norm for level in sweep.levels]),
    ):
        if gradient is None:
            continue
        total = 0.0
        for which in reversed(range(len(sweep.levels))):
            total = total + sums[which] * norms[which].square()
            segment = sweep.segments[which]
            step = max(1, (4 << 20) // operand.width)
            for start in range(0, operand.rows, step):
                stop = min(start + step, operand.rows)
                gradient[start:stop, segment].addcmul_(operand.tile(start, stop)[:, segment], total[start:stop, None], value=-1)
