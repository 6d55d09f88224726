"""Hard negatives seen by their own query alone: (N, K, D), or packed (H, D) with offsets.

They are O(H) numbers a row, so they are reduced before the sweep over panels, join its denominators, and get their
gradients after it, when the log-sum-exp is known. Both layouts are handled as packed rows.
"""

from __future__ import annotations

import torch

from .operands import TILE_BYTES, Operand, inverse_norms, project_out, scatter_rows
from .problem import EPS, Direction, Problem, matchable
from .softmax import RowResult, RowSums


class HardNegatives:
    """Logits of the hard negatives and their sums a row.

    Args:
        problem, direction: the rows, and the forward softmax that these candidates enter.
        negatives: (N, K, D) or (H, D). offsets: (N + 1,) for the packed layout.
        target_ids: (n,) ids of the rows' positives with -1 made unmatchable, or None. ids: (N, K) or (H,).
    """

    def __init__(self, problem: Problem, direction: Direction, negatives, offsets, target_ids, ids):
        self.problem = problem
        rows, dtype, device = problem.query.rows, problem.dtype, problem.device
        packed = negatives.reshape(-1, negatives.shape[-1])
        if offsets is None:
            self.owner = torch.arange(rows, device=device).repeat_interleave(negatives.shape[1], output_size=len(packed))
            self.lengths = torch.full((rows,), negatives.shape[1], device=device, dtype=torch.int64)
        else:
            self.lengths = offsets.diff().to(torch.int64)
            self.owner = torch.arange(rows, device=device).repeat_interleave(self.lengths, output_size=len(packed))
        inverse = inverse_norms(packed, dtype, EPS, problem.active[self.owner]) if problem.options.normalize else None
        # rows that are left out may hold anything, their hard negatives too
        self.operand = Operand(packed, dtype, inverse, problem.active[self.owner])
        self.cosines = torch.empty(len(packed), dtype=dtype, device=device)
        for a, b in self._steps():
            self.cosines[a:b] = (problem.query.gathered(self.owner).tile(a, b) * self.operand.tile(a, b)).sum(1)
        self.cosines = problem.times_row_scale(self.cosines, self.owner)
        self.dropped = ~problem.active[self.owner]
        if ids is not None:
            self.dropped |= ids.reshape(-1) == target_ids[self.owner]
        if direction.threshold is not None:
            self.dropped |= self.cosines > direction.threshold[self.owner]
        scale = problem.inverse_temperature
        if problem.options.hardness_scope in ("all", "hard"):
            scale = scale + problem.options.hardness
        self.logits = (self.cosines * scale).masked_fill_(self.dropped, float("-inf"))
        self.sums = self._sums()

    def _steps(self):
        size = max(1, TILE_BYTES // (self.operand.width * self.problem.dtype.itemsize))
        return [(a, min(a + size, self.operand.rows)) for a in range(0, self.operand.rows, size)]

    def _per_row(self, values: torch.Tensor, how: str) -> torch.Tensor:
        """Reduce (H,) or (H, D) by owner; a row without negatives gives 0 (sum) or -inf (max)."""
        initial = 0.0 if how == "sum" else float("-inf")
        return torch.segment_reduce(values, how, lengths=self.lengths, axis=0, unsafe=True, initial=initial)

    def _sums(self) -> RowSums:
        top = self._per_row(self.logits, "max")
        shift = torch.where(top == float("-inf"), 0, top)
        total = self._per_row((self.logits - shift[self.owner]).exp(), "sum")
        best = self._per_row(self.cosines.masked_fill(self.dropped, float("-inf")), "max")
        sums = RowSums(top, total, best)
        if self.problem.options.label_smoothing:
            sums.logits = self._per_row(self.logits.masked_fill(self.dropped, 0), "sum")
            sums.count = self._per_row((~self.dropped).to(total.dtype), "sum")
        return sums

    def add_gradients(self, direction: Direction, result: RowResult, gradients) -> None:
        """Needs the finished rows: d loss / d logit = weight (exp(logit - lse) - smoothing share)."""
        owner, problem = self.owner, self.problem
        coefficient = (self.logits - result.lse[owner]).exp()
        if result.smooth is not None:
            coefficient = coefficient - torch.where(self.dropped, 0, result.smooth[owner])
        coefficient = coefficient * direction.weight[owner] * problem.inverse_temperature
        if gradients.wants("temperature"):
            gradients.add_temperature(self._per_row(coefficient * self.cosines, "sum"))
        coefficient = problem.times_row_scale(coefficient, owner)
        if gradients.wants("hard_negatives"):
            gradients.accumulators["hard_negatives"] = torch.empty(
                self.operand.rows, self.operand.width, dtype=problem.dtype, device=problem.device
            )
        for a, b in self._steps():
            if gradients.wants("query"):
                scatter_rows(gradients.of("query", problem.query.rows), owner[a:b], self.operand.tile(a, b) * coefficient[a:b, None])
            if gradients.wants("hard_negatives"):
                torch.mul(
                    problem.query.gathered(owner).tile(a, b), coefficient[a:b, None], out=gradients.accumulators["hard_negatives"][a:b]
                )
        if gradients.wants("hard_negatives"):
            project_out(gradients.accumulators["hard_negatives"], self.operand, EPS)


def hard_negatives(problem: Problem, direction: Direction) -> HardNegatives:
    """From the problem's options."""
    o = problem.options
    ids = None if o.hard_ids is None else matchable(o.target_ids[problem.positives])
    return HardNegatives(problem, direction, o.hard_negatives, o.hard_offsets, ids, o.hard_ids)
