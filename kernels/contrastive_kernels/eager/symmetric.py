"""Both directions of `symmetric` in plain torch from the same logits: 8 N M D FLOP where two sweeps take 12.

    sums first:        E = exp(S), its row sums are the one softmax's, its column sums the other's          2 N M D
    gradients then:    G_ij = (f_i + h_j) E_ij,  d_query = G T,  d_target = G^T Q                           6 N M D

with f and h the rows' factors of the two directions. No panel is kept between the passes, so a tile is all the scratch.
"""

from __future__ import annotations

import torch

from ..core.softmax import RowSums, finish, row_factor
from .sweep import PanelBuffers, logits_are_safe


def share_logits(problem, parts) -> bool:
    """Whether column i of the one direction is row i of the other, dropped pairs included, and no logit needs its row's maximum."""
    return (
        len(parts) == 2
        and problem.device.type == "cpu"
        and problem.query.rows == problem.target.rows
        and not problem.options.obstacle("shared_logits")
        and logits_are_safe(problem, parts[0])
    )


def sweep(problem, parts, hard, gradients, workspace, want_best: bool):
    """((RowResult, RowSums) of the forward direction, the same of the reverse); gradients of both are added."""
    forward = parts[0]
    panels = PanelBuffers(problem, forward, workspace, keep=False)
    sums = [RowSums.empty(problem.query.rows, problem.dtype, problem.device, False) for _ in parts]
    for direction_sums in sums:
        direction_sums.shift.zero_()
    for start, stop in panels:
        for tile, part in panels.fill(panels.anchors(start, stop), start, stop):
            if want_best:
                sums[0].best[start:stop] = torch.maximum(sums[0].best[start:stop], part.amax(1) / tile.block.scale)
            part.exp_()
            sums[0].total[start:stop] += part.sum(1)
            sums[1].total[tile.start : tile.stop] += part.sum(0)
    if hard is not None:
        sums[0].add(slice(0, problem.query.rows), hard.sums)
    logit = forward.positive * problem.inverse_temperature
    results = [finish(direction_sums, logit, 0.0) for direction_sums in sums]
    if gradients is None:
        return tuple(zip(results, sums))
    zero = torch.zeros_like(logit)
    f, h = (
        row_factor(direction_sums, logit, zero) * part.weight * problem.inverse_temperature for direction_sums, part in zip(sums, parts)
    )
    for start, stop in panels:
        anchors = panels.anchors(start, stop)
        slopes = (
            part.exp_().mul_(f[start:stop, None] + h[None, tile.start : tile.stop]) for tile, part in panels.fill(anchors, start, stop)
        )
        panels.products(slopes, anchors, start, stop, torch.ones_like(f[start:stop]), gradients)
    for part, result in zip(parts, results):
        gradients.add_positives(part, result.positive * part.weight * problem.inverse_temperature)
    return tuple(zip(results, sums))
