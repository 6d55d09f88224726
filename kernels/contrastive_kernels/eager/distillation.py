"""Distillation from embeddings in plain torch: value and gradients of a panel of rows from both models' logits, never N x M.

    S = student logits, S' = teacher logits   ->   E = exp(S - shift), E' = exp(S' - shift'), sums, sum of E' (S' - S)
    G = f E - f' E'                           ->   d_query = G T,  d_target = G^T Q

Four products: 2 N M (3 D + D') FLOP for students of width D and a teacher of width D'. Tiles are masked, exponentiated and summed
while they are in the cache, as in sweep.py.
"""

from __future__ import annotations

import torch

from ..core.distillation import DistillationSums, Side, finish
from ..core.gradients import Gradients
from ..core.softmax import mask_logits, reduce_logits, row_factor
from .sweep import PanelBuffers, logits_are_safe

MOST = 1e30  # of a quotient that multiplies exponentials; beyond it they are scaled apart


def sweep(student: Side, teacher: Side, gradients: Gradients | None, workspace: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) losses of all rows, and the slopes at their own targets; gradients of all other pairs are added."""
    sides = student, teacher
    safe = [logits_are_safe(side.problem, side.direction) for side in sides]
    panels, other = (PanelBuffers(side.problem, side.direction, workspace // 2, keep=gradients is not None) for side in sides)
    panels.size = other.size = min(panels.size, other.size)
    sums = DistillationSums.empty(panels.rows, student.problem.dtype, student.problem.device)
    logits = [side.anchor_logit for side in sides]
    weight = student.direction.weight * student.problem.inverse_temperature
    for start, stop in panels:
        rows = slice(start, stop)
        anchors = panels.anchors(start, stop)
        parts, reduced = [], []
        for (tile, part), (_, teacher_part) in zip(panels.fill(anchors, start, stop), other.fill(other.anchors(start, stop), start, stop)):
            gap = teacher_part - part
            mask_logits(gap, tile.block, rows, None, None, tile.dead, 0.0)  # there both are -inf
            pair = [reduce_logits(x, tile.block.scale, fixed, False, False)[0] for x, fixed in zip((part, teacher_part), safe)]
            sums.add(rows, *pair, gap.mul_(teacher_part).sum(1))
            parts.append((part, teacher_part))
            reduced.append(pair)
        if gradients is None:
            continue
        factor = _slopes(parts, reduced, sums, logits, rows, all(safe))
        panels.products((part for part, _ in parts), anchors, start, stop, factor * weight[rows], gradients)
    return finish(sums, student, teacher)


def _slopes(parts, reduced, sums: DistillationSums, logits, rows: slice, safe: bool) -> torch.Tensor:
    """Each pair of exponentials becomes Q - P over the row's factor (r,), which is returned; in the student's place."""
    shifts = [torch.where(x.shift[rows] == float("-inf"), 0, x.shift[rows]) for x in (sums.student, sums.teacher)]
    f, g = (row_factor(x.rows(rows), logit[rows], shift) for x, logit, shift in zip((sums.student, sums.teacher), logits, shifts))
    if safe and f.device.type == "cpu":
        quotient = g / f
        if bool((quotient < MOST).all()):
            for part, teacher_part in parts:
                part.addcmul_(teacher_part, quotient[:, None], value=-1)
            return f
    for (part, teacher_part), tile in zip(parts, reduced):
        # -inf for a tile without candidates, whose zeros stay
        own, its = (factor * (x.shift - shift).exp() for factor, x, shift in zip((f, g), tile, shifts))
        part.mul_(own[:, None]).addcmul_(teacher_part, its[:, None], value=-1)
    return torch.ones_like(f)
