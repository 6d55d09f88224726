"""One shard of columns at a time, as a ring brings them: sums of all shards first, then every shard's gradients from complete sums."""

from __future__ import annotations

import torch

from ..core.gradients import Gradients
from ..core.problem import Direction, Problem
from ..core.softmax import RowSums, cut_negligible, reduce_logits, row_factor
from .sweep import PanelBuffers, smooth


def sum_shard(problem: Problem, direction: Direction, workspace: int, sums: RowSums, want_best: bool) -> None:
    panels = PanelBuffers(problem, direction, workspace, keep=False)
    for start, stop in panels:
        for tile, part in panels.fill(panels.anchors(start, stop), start, stop):
            reduced, _ = reduce_logits(part, tile.block.scale, False, bool(panels.smoothing), want_best)
            sums.add(slice(start, stop), reduced)


def differentiate_shard(problem: Problem, direction: Direction, workspace: int, sums: RowSums, result, logit, gradients: Gradients) -> None:
    """Add the gradients of one shard of columns, the rows' sums being complete."""
    panels, weight = PanelBuffers(problem, direction, workspace, keep=True), direction.weight
    shift = torch.where(sums.shift == float("-inf"), 0, sums.shift)
    factor = row_factor(sums, logit, shift) * weight
    for start, stop in panels:
        rows, anchors, parts = slice(start, stop), panels.anchors(start, stop), []
        for _, part in panels.fill(anchors, start, stop):
            dropped = part == float("-inf") if panels.smoothing else None
            cut_negligible(part.sub_(shift[rows, None]))
            part.exp_()
            if panels.smoothing:
                smooth(part, dropped, factor[rows], weight[rows] * result.smooth[rows])
            parts.append(part)
        rows_factor = torch.ones_like(factor[rows]) if panels.smoothing else factor[rows]
        panels.products(parts, anchors, start, stop, rows_factor * problem.inverse_temperature, gradients)
