"""What an implementation of the losses provides. It is chosen once, where a call's problem is built, and kept on it."""

from __future__ import annotations

import abc
import functools
import logging

import torch

from ..options import InfoNCEOptions
from .gradients import Computed, Gradients
from .hard_negatives import HardNegatives
from .operands import Operand, RowOperations
from .problem import Direction, Problem
from .softmax import RowResult, RowSums

logger = logging.getLogger(__name__)
Swept = tuple[RowResult, RowSums | None]  # of all rows of one direction, (n,) each


class Backend(RowOperations):
    """Plain torch and the Triton kernels each are one of these. `name` is what `backend=` calls it."""

    name: str

    @abc.abstractmethod
    def sweep_direction(
        self,
        problem: Problem,
        direction: Direction,
        hard: HardNegatives | None,
        gradients: Gradients | None,
        workspace: int,
        want_best: bool,
    ) -> Swept:
        """Reduce every row of one direction and add its gradients. `want_best`: also each row's greatest cosine of a negative."""

    @abc.abstractmethod
    def sweep_symmetric(
        self,
        problem: Problem,
        directions: list[Direction],
        hard: HardNegatives | None,
        gradients: Gradients | None,
        workspace: int,
        want_best: bool,
    ) -> list[Swept] | None:
        """Both directions of `symmetric` from the same logits, or None where each needs its own."""

    def sweep(
        self, problem: Problem, directions: list[Direction], hard: HardNegatives | None, gradients: Gradients | None, workspace: int
    ) -> list[Swept]:
        """Reduce every row of all directions, hard negatives joining the forward one, and add all their gradients."""
        want_best = problem.options.return_stats
        shared = self.sweep_symmetric(problem, directions, hard, gradients, workspace, want_best) if len(directions) > 1 else None
        results = []
        for number, direction in enumerate(directions):
            its_hard = hard if direction.forward else None
            if shared is None:
                swept = self.sweep_direction(problem, direction, its_hard, gradients, workspace, want_best and direction.forward)
            else:
                swept = shared[number]
            if its_hard is not None and gradients is not None:
                its_hard.add_gradients(direction, swept[0], gradients)
            results.append(swept)
        return results

    @abc.abstractmethod
    def sum_shard(self, problem: Problem, direction: Direction, workspace: int, sums: RowSums, want_best: bool) -> None:
        """First turn of a ring: add one shard's sums of every row to `sums`."""

    @abc.abstractmethod
    def differentiate_shard(
        self,
        problem: Problem,
        direction: Direction,
        workspace: int,
        sums: RowSums,
        result: RowResult,
        logit: torch.Tensor,
        gradients: Gradients,
    ) -> None:
        """Second turn: add the gradients of one shard of columns, the rows' sums being complete; `logit` (n,) are the positives'."""

    @abc.abstractmethod
    def matryoshka(
        self,
        query: torch.Tensor,
        target: torch.Tensor,
        options: InfoNCEOptions,
        levels: list[tuple[int, InfoNCEOptions]],
        wanted: frozenset[str],
        workspace: int,
    ) -> Computed | None:
        """The weighted sum of all levels from one sweep, or None where each level needs its own. `levels`: (width, its options)."""

    @abc.abstractmethod
    def distill(self, student, teacher, gradients: Gradients | None, workspace: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of two `distillation.Side`s: (n,) losses, (n,) slopes at the rows' own targets; gradients of all other pairs are added."""

    @abc.abstractmethod
    def add_sigmoid_columns(self, pairs, target: Operand, target_ids: torch.Tensor | None, offset: int, sums, d_target) -> None:
        """Add to `sums` and `d_target` every pair of the sigmoid loss with these columns, whose first has the global number `offset`."""


@functools.cache
def log_once(reason: str) -> None:
    """Says once why `backend="auto"` does not take the kernels."""
    logger.warning("contrastive_kernels: backend='auto' takes torch: %s", reason)
