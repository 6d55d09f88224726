"""Matryoshka levels in one sweep over the tiles: the accumulator of a prefix grows into that of the next, an epilogue a level.

    logits      2 N M max(d) FLOP for all levels, where a sweep each takes 2 N M sum(d)
    gradients   4 N M sum(d), two products a level

Panels of every level are held at once, so a panel has fewer rows. `plan` prices it against a sweep a level and says why it cannot be had.
"""

from __future__ import annotations

import dataclasses

import torch

from .. import dispatch
from ..core.gradients import Computed, Gradients, finish_gradients
from ..core.hard_negatives import hard_negatives
from ..core.operands import product_dtype
from ..core.problem import build, directions, own_columns
from ..stats import row_sums as stat_sums
from . import configs
from . import panel_sums as panels
from .kernels.common import INTERPRET
from .kernels.exp_panel import exp_panel
from .kernels.row_state import Parts
from .sweep import PanelSweep


def block_k(device, itemsize: int) -> int:
    """Widths of prefixes are multiples of it."""
    return configs.exp_panel(configs.architecture(device), itemsize, True, True).block_k


def obstacle(query, target, options) -> str:
    """Why levels cannot share a sweep, or ""."""
    dims = options.matryoshka_dims
    step = block_k(query.device, query.element_size())
    if options.obstacle("shared_level_panels"):
        return options.obstacle("shared_level_panels")
    if list(dims) != sorted(set(dims)):
        return "the levels are not in ascending order"
    if any(dim % step for dim in dims[:-1]):
        return f"a level is no multiple of {step}"
    return dispatch.obstacle(
        "exp", str(product_dtype(query, target)).removeprefix("torch."), dims[-1], bool(options.label_smoothing), True, INTERPRET
    )


def plan(query, target, options, workspace: int) -> dispatch.Plan:
    """One sweep for all levels against a sweep each, both directions where `symmetric` asks for them."""
    rows, columns = (
        len(query),
        len(target) + (len(query) if options.query_negatives else 0) + (len(target) if options.target_negatives else 0),
    )
    return dispatch.plan_levels(
        rows,
        columns,
        options.matryoshka_dims,
        product_dtype(query, target),
        workspace=workspace,
        gpu=configs.gpu(query.device),
        smoothing=bool(options.label_smoothing),
        interpreted=INTERPRET,
        reason=obstacle(query, target, options),
    )


@dataclasses.dataclass
class LevelSweep:
    """One width: its problem, directions, gradients, and the rows' results as they come."""

    problem: object
    parts: list
    gradients: Gradients | None
    hard: object
    losses: list[torch.Tensor] = dataclasses.field(default_factory=list)
    stat_sums: torch.Tensor | None = None


def compute(query, target, level_options, wanted, rows: int, backend) -> list[Computed]:
    """What `compute._one_width` gives for every level, from one sweep a direction in panels of `rows` rows.

    level_options: options of each level, which differ in their width alone; queries and targets are cut to it here.
    """
    levels = []
    for dim, options in level_options:
        problem = build(query[:, :dim], target[:, :dim], options, backend)
        parts = directions(problem, *own_columns(problem))
        hard = None if options.hard_negatives is None else hard_negatives(problem, parts[0])
        levels.append(LevelSweep(problem, parts, Gradients(problem, wanted) if wanted else None, hard))
    for index in range(len(levels[0].parts)):
        _sweep(levels, index, rows)
    out = []
    for level in levels:
        loss = sum(level.losses[1:], level.losses[0])
        computed = Computed(loss if level.problem.options.reduction == "none" else loss.sum(), stat_sums=level.stat_sums)
        if level.gradients is not None:
            finish_gradients(level.problem, level.gradients, computed)
        out.append(computed)
    return out


def _sweep(levels: list[LevelSweep], index: int, size: int) -> None:
    """One direction of every level."""
    sweeps = [PanelSweep(level.problem, level.parts[index], level.gradients, 1 << 62) for level in levels]
    forward = levels[0].parts[index].forward
    states = [panel_sweep.state(level.hard if forward else None) for level, panel_sweep in zip(levels, sweeps)]
    widest, count = sweeps[-1], len(levels)
    outs = None
    for start in range(0, widest.rows, size):
        rows = slice(start, min(start + size, widest.rows))
        if outs is None and levels[0].gradients is not None:
            outs = [torch.empty(count * size * len(view.y), dtype=widest.dtype, device=widest.problem.device) for view in widest.views]
        level_outs = [None] * len(widest.views)
        if outs is not None:
            level_outs = [
                out[: count * (rows.stop - start) * len(view.y)].view(count, rows.stop - start, len(view.y))
                for out, view in zip(outs, widest.views)
            ]
        for number, (panel_sweep, (state, prior), sums) in enumerate(zip(sweeps, states, _exponentials(sweeps, rows, level_outs))):
            panel_sweep.add(state, rows, [sums], prior=prior, complete=True)
            if panel_sweep.gradients is not None:
                panel_sweep.products(rows, [e[number] for e in level_outs], state.factor[rows], state.positive[rows])
    for level, panel_sweep, (state, _) in zip(levels, sweeps, states):
        direction, result = panel_sweep.direction, state.result()
        if level.gradients is not None:
            panel_sweep.writer.positives(state.positive)
            if level.hard is not None and forward:
                level.hard.add_gradients(direction, result, level.gradients)
        level.losses.append(result.weighted)
        if forward and level.problem.options.return_stats:
            level.stat_sums = stat_sums(level.problem.active, result.lse, direction.positive, state.sums.best)


def _exponentials(sweeps: list[PanelSweep], rows: slice, outs) -> list[Parts]:
    """Fill outs[b] (L, R, C_b) and sum the rows of every level; unsafe rows are done again, a level at a time."""
    widest, dims = sweeps[-1], [panel_sweep.problem.query.width for panel_sweep in sweeps]
    device, shift = widest.problem.device, widest.fixed_shift[rows]
    levels = torch.stack([torch.full((), dim, dtype=torch.int32, device=device) for dim in dims])
    bounded = all(panel_sweep.bounded for panel_sweep in sweeps)
    want_best = not bounded or widest.problem.options.return_stats
    row_parts = []
    for number, (view, out) in enumerate(zip(widest.views, outs)):
        views = [panel_sweep.views[number] for panel_sweep in sweeps]
        masks = view.options(rows)
        masks |= dict(row_scale=torch.stack([v.row_scale[rows] for v in views]), col_scale=torch.stack([v.col_scale for v in views]))
        if view.threshold is not None:
            masks["threshold"] = torch.stack([v.threshold[rows] for v in views])
        row_parts.append(
            exp_panel(
                view.x[rows],
                view.y,
                scale=widest.exponent,
                shift=shift.expand(len(sweeps), -1).contiguous(),
                out=out,
                store=out is not None,
                row_max=want_best,
                levels=levels,
                **masks,
            ).row_part
        )
    parts = []
    for number, panel_sweep in enumerate(sweeps):
        part = Parts(panels.joined(row_parts, 0, number), shift, panels.joined(row_parts, 1, number) if want_best else None)
        if not panel_sweep.bounded:
            panels.redo(panel_sweep.views, rows, [None if e is None else e[number] for e in outs], part, panel_sweep.exponent)
        parts.append(part)
    return parts
