"""The computation behind the public losses: every direction and level of one rank, value and wanted gradients."""

from __future__ import annotations

import dataclasses

import torch

from ..eager import matryoshka as torch_levels
from ..options import InfoNCEOptions
from ..stats import row_sums
from . import distributed
from .backends import choose, levels_for, project_out, sweep_for
from .gradients import Gradients
from .hard_negatives import hard_negatives
from .operands import product_dtype
from .problem import EPS, Direction, Problem, build, directions, own_columns
from .workspace import workspace_bytes


@dataclasses.dataclass
class Computed:
    """Loss (0-d, or (N,) for reduction none), gradients in the compute dtype or None, and the (7,) sums of the statistics."""

    loss: torch.Tensor
    d_query: torch.Tensor | None = None
    d_target: torch.Tensor | None = None
    d_hard_negatives: torch.Tensor | None = None
    d_temperature: torch.Tensor | None = None
    stat_sums: torch.Tensor | None = None


def compute(query, target, options: InfoNCEOptions, wanted: frozenset[str]) -> Computed:
    """Loss and the gradients named in `wanted`: of "query", "target", "hard_negatives", "temperature".

    With reduction "none" and gradients wanted, `options.weight` must already hold the cotangent; use "sum" then.
    """
    with torch.no_grad(), torch.autocast(device_type=query.device.type, enabled=False):
        if options.matryoshka_dims is not None:
            return _levels(query, target, options, wanted)
        return _one_level(query, target, options, wanted)


def _one_level(query, target, options, wanted) -> Computed:
    workspace = workspace_bytes(options, query, target)
    if options.group is not None:
        return distributed.one_level(query, target, options, wanted, workspace)
    problem = build(query, target, options)
    gradients = Gradients(problem, wanted) if wanted else None
    out = reduce_directions(problem, directions(problem, *own_columns(problem)), gradients, workspace)
    if gradients is not None:
        finish_gradients(problem, gradients, out)
    return out


def reduce_directions(problem: Problem, parts: list[Direction], gradients: Gradients | None, workspace: int) -> Computed:
    """Every direction over columns that are all at hand, one sweep each."""
    options = problem.options
    hard = None if options.hard_negatives is None else hard_negatives(problem, parts[0])
    sweep = sweep_for(problem, parts)
    losses, stat_sums = [], None
    for direction in parts:
        own = hard if direction.forward else None
        want_best = options.return_stats and direction.forward
        result, rows = sweep(problem, direction, own, gradients, workspace, want_best)
        if own is not None and gradients is not None:
            own.add_gradients(direction, result, gradients)
        losses.append(torch.where(direction.weight != 0, direction.weight * result.loss, 0) if result.weighted is None else result.weighted)
        if want_best:
            stat_sums = row_sums(problem.kept, result.lse, direction.positive, rows.best)
    loss = losses[0] if len(losses) == 1 else sum(losses)
    return Computed(loss if options.reduction == "none" else loss.sum(), stat_sums=stat_sums)


def finish_gradients(problem: Problem, gradients: Gradients, out: Computed) -> None:
    """Gradients of the matrices as passed, and the temperature's sign and factor."""
    for name, operand in (("query", problem.query), ("target", problem.target)):
        if gradients.wants(name):
            gradient = gradients.of(name, operand.rows)
            if name not in gradients.projected:
                project_out(gradient, operand, EPS, problem.backend)
            setattr(out, f"d_{name}", gradient)
    if gradients.wants("hard_negatives"):
        out.d_hard_negatives = gradients.held["hard_negatives"].view(problem.options.hard_negatives.shape)
    if gradients.wants("temperature"):
        # d s / d temperature = -s / temperature; the sweeps have summed (d loss / d s) * s
        out.d_temperature = -gradients.temperature * problem.inverse_temperature


def _levels(query, target, options: InfoNCEOptions, wanted) -> Computed:
    """Matryoshka: the sum over widths of weight * loss of the re-normalised prefix."""
    dims = options.matryoshka_dims
    weights = options.matryoshka_weights or (1.0,) * len(dims)
    total = Computed(0.0)
    levels = []
    for dim in dims:
        hard = None if options.hard_negatives is None else options.hard_negatives[..., :dim]
        level = options.replace(
            matryoshka_dims=None,
            matryoshka_weights=None,
            normalize=True,
            hard_negatives=hard,
            return_stats=options.return_stats and dim == max(dims),
        )
        levels.append((dim, level))
    workspace = workspace_bytes(options, query, target)
    if choose(options.backend, product_dtype(query, target), query.device) == "torch":
        shared = torch_levels.together(query, target, options, levels)
        if shared is not None:
            loss, d_query, d_target, d_temperature, sums = torch_levels.compute(query, target, shared, wanted, workspace)
            return Computed(loss, d_query, d_target, None, d_temperature, sums)
    together = levels_for(query, target, options, workspace)
    if together is not None:
        made = together(query, target, levels, wanted)
    else:
        made = (_one_level(query[:, :dim], target[:, :dim], level, wanted) for dim, level in levels)
    for dim, level_weight, part in zip(dims, weights, made):
        total.loss = total.loss + level_weight * part.loss
        if part.stat_sums is not None:
            total.stat_sums = part.stat_sums
        for name, like in (("d_query", query), ("d_target", target), ("d_hard_negatives", options.hard_negatives)):
            gradient = getattr(part, name)
            if gradient is None:
                continue
            if getattr(total, name) is None:
                setattr(total, name, torch.zeros(like.shape, dtype=gradient.dtype, device=gradient.device))
            getattr(total, name)[..., :dim].add_(gradient, alpha=level_weight)
        if part.d_temperature is not None:
            before = 0.0 if total.d_temperature is None else total.d_temperature
            total.d_temperature = before + level_weight * part.d_temperature
    return total
