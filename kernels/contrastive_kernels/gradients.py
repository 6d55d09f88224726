"""Where gradients are added up: one accumulator a matrix, in the compute dtype."""

from __future__ import annotations

import torch

from contrastive_kernels.operands import TILE_BYTES, scatter_rows
from contrastive_kernels.problem import Direction, Problem

MATRIX = {"all_queries": "query", "all_targets": "target", "positive": "target"}


class Gradients:
    """Accumulators by name, made when first written. "positive" is the rows' own targets, written through their index.

    `wanted` names matrices: a sink is wanted when its matrix is ("all_targets" is the gathered "target").
    """

    def __init__(self, problem: Problem, wanted: frozenset[str]):
        self.problem, self.wanted = problem, wanted
        self.held: dict[str, torch.Tensor] = {}
        # sum over pairs of (d loss / d logit) * s; the temperature's gradient is -1/temperature times this
        self.temperature = torch.zeros((), dtype=problem.dtype, device=problem.device)

    def wants(self, name: str) -> bool:
        return MATRIX.get(name, name) in self.wanted

    def of(self, name: str, rows: int) -> torch.Tensor:
        if name not in self.held:
            width, dtype = self.problem.query.width, self.problem.dtype
            self.held[name] = torch.zeros(rows, width, dtype=dtype, device=self.problem.device)
        return self.held[name]

    def add_anchors(self, name: str, start: int, stop: int, rows: torch.Tensor) -> None:
        """Add gradients of anchors [start, stop), which are the rows' queries or their positives."""
        if name == "positive":
            index = self.problem.positives[start:stop]
            scatter_rows(self.of("target", self.problem.target.rows), index, rows)
        else:
            self.of(name, self.problem.query.rows)[start:stop].add_(rows)

    def add_positives(self, direction: Direction, coefficient: torch.Tensor) -> None:
        """The positive's own term: q += g t, t += g q, with g (n,) the derivative with respect to its cosine."""
        problem = self.problem
        if self.wants("temperature"):
            self.temperature += (coefficient * direction.positive).sum()
        positive = problem.target.gathered(problem.positives)
        step = max(1, TILE_BYTES // (problem.query.width * problem.dtype.itemsize))
        for start in range(0, problem.query.rows, step):
            stop = min(start + step, problem.query.rows)
            scale = coefficient[start:stop, None]
            if self.wants("query"):
                self.add_anchors("query", start, stop, positive.tile(start, stop) * scale)
            if self.wants("target"):
                self.add_anchors("positive", start, stop, problem.query.tile(start, stop) * scale)
