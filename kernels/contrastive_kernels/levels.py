"""Matryoshka in plain torch: all levels from one sweep over the tiles, 6 N M D FLOP whatever their number.

Cosines of prefixes share their products: raw_k = raw_(k-1) + q[d_(k-1):d_k] . t[d_(k-1):d_k], and cos_k = raw_k / (|q_:k| |t_:k|). So do
gradients: with W_k = d loss / d cos_k the columns of segment k of both matrices need the sum of W_l / (|q_:l| |t_:l|) over the levels l >= k,
formed from the widest level down. The normalisation's own term is the sum of W_k cos_k over a row (a column) times the prefix:

    d q_i[segment s] = sum over l >= s of ( sum_j W_l,ij t_j / (|q_i:l| |t_j:l|)  -  q_i sum_j W_l,ij cos_l,ij / |q_i:l|^2 )

and W cos comes from E alone, whose logarithm is the logit (the shift is 0 here). Legend: r rows of a panel, c columns of a tile.
"""

from __future__ import annotations

import torch

from contrastive_kernels import panels
from contrastive_kernels.gemm import add_product, product_into, transposed
from contrastive_kernels.operands import Operand, scatter_rows
from contrastive_kernels.panels import logits_are_safe, panel_rows, tiles
from contrastive_kernels.problem import EPS, build, directions, own_columns
from contrastive_kernels.softmax import RowSums, finish, mask_logits, row_factor
from contrastive_kernels.stats import row_sums

APART = ("symmetric", "query_negatives", "target_negatives", "label_smoothing")


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
        longest = max(level.query_norm.max(), level.target_norm.max())
        # a prefix without direction has a gradient of 0 on its own side alone: one matrix for both sides cannot say so
        if not logits_are_safe(level.problem, level.direction) or longest >= 0.999 / EPS:
            return None
    return made


class Sweep:
    """Buffers of all levels and the walk over panels and tiles."""

    def __init__(self, query, target, levels: list[Level], wanted: frozenset[str], workspace: int):
        first = levels[-1].problem
        self.levels, self.wanted, self.dtype = levels, wanted, first.dtype
        self.rows, self.columns, width = len(query), len(target), levels[-1].dim
        self.query = Operand(query[:, :width], self.dtype, None, first.options.query_mask)
        self.target = Operand(target[:, :width], self.dtype, None, first.options.target_mask)
        self.parts = [tiles([level.block], panels.TILE_COLUMNS) for level in levels]
        widest, item = self.parts[0][0].width, self.dtype.itemsize
        held = self.columns if wanted else widest
        row = (held * len(levels) + 4 * widest + 4 * width) * item
        self.size = panel_rows(self.rows, row, 3 * widest * width * item, workspace)
        self.planes = [torch.empty(self.size * held, dtype=self.dtype) for _ in levels]
        self.raw = torch.empty(self.size * widest, dtype=self.dtype)
        edges = [0, *(level.dim for level in levels)]
        self.segments = [slice(a, b) for a, b in zip(edges, edges[1:])]
        self.d_query = torch.zeros(self.rows, width, dtype=self.dtype) if "query" in wanted or "temperature" in wanted else None
        self.d_target = torch.zeros(self.columns, width, dtype=self.dtype) if "target" in wanted else None
        # sums of W cos over each row's columns and each column's rows
        self.along_rows = [torch.zeros(self.rows, dtype=self.dtype) for _ in levels]
        self.along_columns = [torch.zeros(self.columns, dtype=self.dtype) for _ in levels]

    def run(self) -> None:
        for start in range(0, self.rows, self.size):
            stop = min(start + self.size, self.rows)
            anchors = self.query.tile(start, stop)
            for index in range(len(self.parts[0])):
                self.fill(index, anchors, start, stop)
            if self.wanted:
                self.products(anchors, start, stop)

    def plane(self, which: int, index: int, start: int, stop: int) -> torch.Tensor:
        """(c, r) exponentials of one level's tile."""
        tile, rows = self.parts[which][index], stop - start
        first = tile.start if self.wanted else 0
        return self.planes[which][first * rows : (first + tile.width) * rows].view(tile.width, rows)

    def fill(self, index: int, anchors, start: int, stop: int) -> None:
        """Exponentials of every level's tile, and their sums."""
        tile = self.parts[0][index]
        raw = self.raw[: tile.width * (stop - start)].view(tile.width, stop - start)
        candidates = self.target.tile(tile.start, tile.stop)
        for which, (level, segment) in enumerate(zip(self.levels, self.segments)):
            (add_product if which else product_into)(raw, candidates[:, segment], anchors[:, segment])
            part, block = self.plane(which, index, start, stop), self.parts[which][index]
            torch.mul(raw, level.target_norm[tile.start : tile.stop, None], out=part)
            part.mul_((level.query_norm[start:stop] * level.block.scale)[None, :])
            mask_logits(part.T, block.block, slice(start, stop), level.direction.threshold, level.direction.active, block.dead)
            sums = level.sums
            if level.want_best:
                sums.best[start:stop] = torch.maximum(sums.best[start:stop], part.amax(0) / level.block.scale)
            sums.total[start:stop] += part.exp_().sum(0)

    def products(self, anchors, start: int, stop: int) -> None:
        """Gradients of one panel of rows, widest level first."""
        rows = slice(start, stop)
        factors = []
        for level in self.levels:
            share = row_factor(level.sums.rows(rows), level.logit[rows], torch.zeros_like(level.logit[rows]))
            factors.append(share * level.direction.weight[rows] * (level.problem.inverse_temperature * level.weight))
        pulled = torch.zeros(self.query.width, stop - start, dtype=self.dtype)
        across = transposed(anchors, self.parts[0][0].width) if self.d_target is not None else None
        for index, tile in enumerate(self.parts[0]):
            columns = slice(tile.start, tile.stop)
            candidates = transposed(self.target.tile(tile.start, tile.stop), stop - start) if self.d_query is not None else None
            slopes = None
            for which in reversed(range(len(self.levels))):
                level, factor, segment = self.levels[which], factors[which], self.segments[which]
                part = self.plane(which, index, start, stop)
                weighted = part.clamp(min=torch.finfo(self.dtype).tiny).log_().mul_(part)  # E times its logit, 0 where E is
                self.along_rows[which][rows] += weighted.sum(0) * (factor / level.block.scale)
                self.along_columns[which][columns] += weighted @ (factor / level.block.scale)
                part.mul_((factor * level.query_norm[rows])[None, :])
                if slopes is None:
                    slopes = part.mul_(level.target_norm[columns, None])
                else:
                    slopes.addcmul_(part, level.target_norm[columns, None])
                if self.d_query is not None:
                    add_product(pulled[segment], candidates[segment], slopes.T)
                if self.d_target is not None:
                    add_product(self.d_target[columns, segment], slopes, across[segment])
        if self.d_query is not None:
            self.d_query[rows] += pulled.T.contiguous()


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
    positives = sweep.levels[0].problem.positives
    total = torch.zeros(sweep.rows, dtype=sweep.dtype)
    for which in reversed(range(len(sweep.levels))):
        level, segment = sweep.levels[which], sweep.segments[which]
        slope = results[which].positive * level.direction.weight * (level.problem.inverse_temperature * level.weight)
        with_cosine = slope * level.direction.positive
        sweep.along_rows[which] += with_cosine
        sweep.along_columns[which].index_add_(0, positives, with_cosine)
        total = total + slope * level.query_norm * level.target_norm[positives]
        query, target = (side.narrow(segment.start, segment.stop) for side in (sweep.query, sweep.target))
        step = max(1, (4 << 20) // query.width)
        for start in range(0, sweep.rows, step):
            rows = slice(start, min(start + step, sweep.rows))
            index = positives[rows]
            if sweep.d_query is not None:
                sweep.d_query[rows, segment] += target.gathered(index).tile(0, len(index)) * total[rows, None]
            if sweep.d_target is not None:
                piece = query.tile(rows.start, rows.stop) * total[rows, None]
                scatter_rows(sweep.d_target[:, segment], index, piece)


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
