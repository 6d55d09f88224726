"""Matryoshka levels in one sweep over the tiles: the accumulator of a prefix grows into that of the next, an epilogue a level.

    logits      2 N M max(d) FLOP for all levels, where a sweep each takes 2 N M sum(d)
    gradients   4 N M sum(d), two products a level

Panels of every level are held at once, so a panel has fewer rows. `plan` prices it against a sweep a level and says why it cannot be had.
"""

from __future__ import annotations

import dataclasses

import torch

from contrastive_kernels import dispatch, roofline
from contrastive_kernels.gradients import Gradients
from contrastive_kernels.hard import hard_negatives
from contrastive_kernels.operands import product_dtype
from contrastive_kernels.problem import build, directions, own_columns
from contrastive_kernels.softmax import RowSums, finish, row_factor
from contrastive_kernels.stats import row_sums as stat_sums
from contrastive_kernels.triton import configs
from contrastive_kernels.triton import panel as panels
from contrastive_kernels.triton.common import INTERPRET, scalar
from contrastive_kernels.triton.exp_panel import exp_panel
from contrastive_kernels.triton.panel import PanelSums
from contrastive_kernels.triton.sweep import Panels, row_sums


def block_k(device, itemsize: int) -> int:
    """Widths of prefixes are multiples of it."""
    return configs.exp_panel(configs.architecture(device), itemsize, True, True).block_k


def obstacle(query, target, options) -> str:
    """Why levels cannot share a sweep, or ""."""
    dims = options.matryoshka_dims
    step = block_k(query.device, query.element_size())
    if options.group is not None:
        return "a group exchanges one level at a time"
    if list(dims) != sorted(set(dims)):
        return "the levels are not in ascending order"
    if any(dim % step for dim in dims[:-1]):
        return f"a level is no multiple of {step}"
    return dispatch.obstacle("exp", str(product_dtype(query, target)).removeprefix("torch."), dims[-1], bool(options.label_smoothing), True, INTERPRET)


def plan(query, target, options, workspace: int) -> dispatch.Plan:
    """One sweep for all levels against a sweep each, both directions where `symmetric` asks for them."""
    gpu = roofline.for_arch(configs.architecture(query.device) or 90)
    rows, columns = len(query), len(target) + (len(query) if options.query_negatives else 0) + (len(target) if options.target_negatives else 0)
    return dispatch.plan_levels(
        rows, columns, options.matryoshka_dims, product_dtype(query, target), workspace=workspace, gpu=gpu, smoothing=bool(options.label_smoothing),
        interpreted=INTERPRET, reason=obstacle(query, target, options),
    )


@dataclasses.dataclass
class Level:
    """One width: its problem, directions, gradients, and the rows' results as they come."""

    problem: object
    parts: list
    gradients: Gradients | None
    hard: object
    loss: torch.Tensor
    stat_sums: torch.Tensor | None = None


def compute(query, target, level_options, wanted, rows: int) -> list:
    """What `compute._one_level` gives for every level, from one sweep a direction in panels of `rows` rows.

    level_options: options of each level, which differ in their width alone; queries and targets are cut to it here.
    """
    from contrastive_kernels.compute import Computed, finish_gradients

    levels = []
    for dim, options in level_options:
        problem = build(query[:, :dim], target[:, :dim], options)
        parts = directions(problem, *own_columns(problem))
        hard = None if options.hard_negatives is None else hard_negatives(problem, parts[0])
        levels.append(Level(problem, parts, Gradients(problem, wanted) if wanted else None, hard, torch.zeros_like(problem.share)))
    for index in range(len(levels[0].parts)):
        _sweep(levels, index, rows)
    out = []
    for level in levels:
        made = Computed(level.loss if level.problem.options.reduction == "none" else level.loss.sum(), stat_sums=level.stat_sums)
        if level.gradients is not None:
            finish_gradients(level.problem, level.gradients, made)
        out.append(made)
    return out


def _sweep(levels: list[Level], index: int, size: int) -> None:
    """One direction of every level."""
    works = [Panels(level.problem, level.parts[index], level.gradients, 1 << 62) for level in levels]
    sums = [RowSums.empty(work.rows, work.problem.dtype, work.problem.device, False) for work in works]
    for level, own in zip(levels, sums):
        if level.hard is not None and level.parts[index].forward:
            own.add(slice(0, works[0].rows), level.hard.sums)
    widest, count = works[-1], len(levels)
    outs = None
    for start in range(0, widest.rows, size):
        rows = slice(start, min(start + size, widest.rows))
        if outs is None and levels[0].gradients is not None:
            outs = [torch.empty(count * size * len(view.y), dtype=widest.dtype, device=widest.problem.device) for view in widest.views]
        here = [None] * len(widest.views)
        if outs is not None:
            here = [out[: count * (rows.stop - start) * len(view.y)].view(count, rows.stop - start, len(view.y)) for out, view in zip(outs, widest.views)]
        for number, (work, own, made) in enumerate(zip(works, sums, _exponentials(works, rows, here))):
            own.add(rows, row_sums(made))
            if work.gradients is not None:
                factor = row_factor(own.rows(rows), work.logit[rows], made.shift) * work.direction.weight[rows]
                work.products(rows, [e[number] for e in here], factor * work.problem.inverse_temperature, work.positive_term(rows, own))
    for level, work, own in zip(levels, works, sums):
        _finish(level, index, work, own)


def _exponentials(works: list[Panels], rows: slice, outs) -> list[PanelSums]:
    """Fill outs[b] (L, R, C_b) and sum the rows of every level; unsafe rows are done again, a level at a time."""
    widest, dims = works[-1], [work.problem.query.width for work in works]
    acc, device, inactive = widest.problem.dtype, widest.problem.device, widest.inactive(rows)
    levels = torch.stack([scalar(dim, torch.int32, device) for dim in dims])
    scales = [scalar(view.scale, acc, device) for view in widest.views]
    shift = (torch.stack(scales).amax() - panels.SHIFT_BELOW_TOP).expand(rows.stop - rows.start).contiguous()
    if inactive is not None:
        shift = torch.where(inactive, float("inf"), shift)
    total, best, tops = 0.0, None, None
    for number, (view, out, scale) in enumerate(zip(widest.views, outs, scales)):
        views = [work.views[number] for work in works]
        masks = view.options(rows)
        masks |= dict(row_scale=torch.stack([v.row_scale[rows] for v in views]), col_scale=torch.stack([v.col_scale for v in views]))
        if view.threshold is not None:
            masks["threshold"] = torch.stack([v.threshold[rows] for v in views])
        made = exp_panel(
            view.x[rows], view.y, scale=view.scale, shift=shift.expand(len(works), -1).contiguous(), out=out, store=out is not None,
            row_max=True, levels=levels, **masks,
        )
        total = total + made.row_sum
        best = made.row_max if best is None else torch.maximum(best, made.row_max)
        logit = made.row_max * scale
        tops = logit if tops is None else torch.maximum(tops, logit)
    out = []
    for number, work in enumerate(works):
        into = [None if e is None else e[number] for e in outs]
        own, summed = panels.redo(work.views, rows, into, shift, total[number], tops[number])
        if inactive is not None:
            own, best[number] = torch.where(inactive, 0.0, own), torch.where(inactive, float("-inf"), best[number])
        out.append(PanelSums(own, summed, best[number]))
    return out


def _finish(level: Level, index: int, work: Panels, sums: RowSums) -> None:
    direction, problem = level.parts[index], level.problem
    result = finish(sums, work.logit, 0.0)
    if level.gradients is not None:
        work.writer.positives(result.positive * direction.weight * problem.inverse_temperature)
        if level.hard is not None and direction.forward:
            level.hard.add_gradients(direction, result, level.gradients)
    level.loss += torch.where(direction.weight != 0, direction.weight * result.loss, 0)
    if direction.forward and problem.options.return_stats:
        level.stat_sums = stat_sums(problem.kept, result.lse, direction.positive, sums.best)
