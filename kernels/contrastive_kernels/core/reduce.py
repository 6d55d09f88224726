"""From directions whose columns are all at hand to the loss, its gradients and statistics."""

from __future__ import annotations

import torch

from ..stats import row_sums
from .gradients import Computed, Gradients
from .hard_negatives import hard_negatives
from .problem import Direction, Problem


def reduce_directions(problem: Problem, directions: list[Direction], gradients: Gradients | None, workspace: int) -> Computed:
    """Loss and statistics; gradients are added, and finished by `gradients.finish_gradients`."""
    options = problem.options
    hard = None if options.hard_negatives is None else hard_negatives(problem, directions[0])
    losses, stat_sums = [], None
    for direction, (result, sums) in zip(directions, problem.backend.sweep(problem, directions, hard, gradients, workspace)):
        losses.append(torch.where(direction.weight != 0, direction.weight * result.loss, 0) if result.weighted is None else result.weighted)
        if options.return_stats and direction.forward:
            stat_sums = row_sums(problem.active, result.lse, problem.true_cosine(direction.positive), problem.true_cosine(sums.best))
    loss = losses[0] if len(losses) == 1 else sum(losses)
    return Computed(loss if options.reduction == "none" else loss.sum(), stat_sums=stat_sums)
