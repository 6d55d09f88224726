"""Where gradients are added up: one accumulator a matrix, in the compute dtype."""

from __future__ import annotations

import dataclasses

import torch

from ..eager.gemm import add_product, product
from .operands import TILE_BYTES, scatter_rows
from .problem import EPS, Direction, Problem

MATRIX = {"all_queries": "query", "all_targets": "target", "positive": "target"}


@dataclasses.dataclass
class Computed:
    """Loss (0-d, or (N,) for reduction none), gradients in the compute dtype or None, and the (7,) sums of the statistics."""

    loss: torch.Tensor
    d_query: torch.Tensor | None = None
    d_target: torch.Tensor | None = None
    d_hard_negatives: torch.Tensor | None = None
    d_temperature: torch.Tensor | None = None
    stat_sums: torch.Tensor | None = None


class Gradients:
    """Accumulators by name, made when first written. "positive" is the rows' own targets, written through their index.

    `wanted` names matrices: a sink is wanted when its matrix is ("all_targets" is the gathered "target").
    """

    def __init__(self, problem: Problem, wanted: frozenset[str]):
        self.problem, self.wanted = problem, wanted
        self.accumulators: dict[str, torch.Tensor] = {}
        self.projected: set[str] = set()  # matrices whose gradient is that of the rows as passed already
        # sum over pairs of (d loss / d logit) * s, where wanted; the temperature's gradient is -1/temperature times this
        shape = () if problem.row_scale is None else (problem.query.rows,)
        self.temperature = torch.zeros(shape, dtype=problem.dtype, device=problem.device) if "temperature" in wanted else None

    def wants(self, name: str) -> bool:
        return MATRIX.get(name, name) in self.wanted

    def add_temperature(self, along: torch.Tensor, rows: slice = slice(None)) -> None:
        """Add (d loss / d logit) * s, summed over the candidates of each of `rows`: (r,)."""
        if self.temperature.dim() == 0:
            self.temperature += along.sum()
        else:
            self.temperature[rows] += along

    def of(self, name: str, rows: int) -> torch.Tensor:
        if name not in self.accumulators:
            width, dtype = self.problem.query.width, self.problem.dtype
            self.accumulators[name] = torch.zeros(rows, width, dtype=dtype, device=self.problem.device)
        return self.accumulators[name]

    def add_product(self, name: str, rows: int, start: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add a (m, k) @ b (D, k)^T to rows [start, start + m) of a matrix of `rows` rows."""
        if name not in self.accumulators and len(a) == rows:
            self.accumulators[name] = product(a, b)
        else:
            add_product(self.of(name, rows)[start : start + len(a)], a, b)

    def add_anchors(self, name: str, start: int, stop: int, rows: torch.Tensor, factor: torch.Tensor | None = None) -> None:
        """Add gradients (times `factor`, one a row) of anchors [start, stop), which are the rows' queries or their positives.

        The rows' own scale, which the anchors carry, is put in here.
        """
        problem, to_target = self.problem, name == "positive"
        if problem.row_scale is not None:
            own = problem.row_scale[start:stop]
            factor = own if factor is None else factor * own
        accumulator = self.of("target", problem.target.rows) if to_target else self.of(name, problem.query.rows)
        if to_target and problem.own_targets.index is not None:
            scatter_rows(accumulator, problem.positives[start:stop], rows if factor is None else rows * factor[:, None])
            return
        accumulator = problem.own_rows(accumulator)[start:stop] if to_target else accumulator[start:stop]
        if factor is None:
            accumulator.add_(rows)
        else:
            accumulator.addcmul_(rows, factor[:, None])

    def add_positives(self, direction: Direction, coefficient: torch.Tensor) -> None:
        """The positive's own term: q += g t, t += g q, with g (n,) the derivative with respect to its cosine."""
        problem = self.problem
        if self.wants("temperature"):
            self.add_temperature(coefficient * direction.positive)
        step = max(1, TILE_BYTES // (problem.query.width * problem.dtype.itemsize))
        for start in range(0, problem.query.rows, step):
            stop = min(start + step, problem.query.rows)
            if self.wants("query"):
                self.add_anchors("query", start, stop, problem.own_targets.tile(start, stop), coefficient[start:stop])
            if self.wants("target"):
                self.add_anchors("positive", start, stop, problem.query.tile(start, stop), coefficient[start:stop])


def finish_gradients(problem: Problem, gradients: Gradients, out: Computed) -> None:
    """Gradients of the matrices as passed, and the temperature's sign and factor."""
    for name, operand in (("query", problem.query), ("target", problem.target)):
        if gradients.wants(name):
            gradient = gradients.of(name, operand.rows)
            if operand.inverse_norm is not None and name not in gradients.projected:
                problem.backend.project_out(gradient, operand, EPS)
            setattr(out, f"d_{name}", gradient)
    if gradients.wants("hard_negatives"):
        out.d_hard_negatives = gradients.accumulators["hard_negatives"].view(problem.options.hard_negatives.shape)
    if gradients.wants("temperature"):
        # d s / d temperature = -s / temperature; the sweeps have summed (d loss / d s) * s
        out.d_temperature = -problem.times_row_scale(gradients.temperature * problem.inverse_temperature)
