"""Distillation from embeddings with the kernels: what `contrastive_kernels.eager.distillation.sweep` does in plain torch.

    cosines of both models, float32     library
    sums of the rows, then Q - P        two kernels (kernels/distil_panel.py)
    d_query, d_target                   library

The slopes of a row are written over its mass, the larger share of the two models that is not on its own target, so that they lie in
[-1, 1] whatever the row, and rows of which both models are sure keep their digits in 16 bits.
"""

from __future__ import annotations

import torch

from ..core.distillation import DistillationSums, Side, finish
from ..core.gradients import Gradients
from ..core.operands import product_dtype
from ..core.softmax import RowSums
from ..roofline.distillation import panel_rows
from .gradient_writer import GradientWriter
from .kernels.common import check_dtype
from .kernels.distil_panel import Cosines, Reduction, distil_reduce, distil_write
from .operand_views import OperandViews
from .products import matmul

FLOAT16_GAIN = 2.0**15  # slopes lie in [-1, 1]


class _Model:
    """One side's matrices as the kernels take them."""

    def __init__(self, side: Side):
        dtype = product_dtype(side.problem.query.source, side.problem.target.source)
        check_dtype("query", dtype)
        self.side, self.dtype = side, dtype
        self.views = OperandViews(side.direction, dtype)
        self.view = self.views.views[0]

    def cosines(self, rows: slice) -> torch.Tensor:
        """(R, C) float32 (float64), before norms."""
        return matmul(self.view.x[rows], self.view.y.T, self.side.problem.dtype)

    def launch(self, cos: torch.Tensor, rows: slice) -> Cosines:
        row_scale = None if self.view.row_scale is None else self.view.row_scale[rows]
        return Cosines.of(cos, self.view.scale, row_scale, self.view.col_scale)


def sweep(student: Side, teacher: Side, gradients: Gradients | None, workspace: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) losses of all rows, and the slopes at their own targets; gradients of all other pairs are added."""
    models, problem, direction = (_Model(student), _Model(teacher)), student.problem, student.direction
    n, columns = problem.query.rows, len(models[0].view.y)
    size = panel_rows(n, columns, problem.query.width, models[0].dtype.itemsize, workspace)
    writer = None if gradients is None else GradientWriter(problem, direction, gradients, models[0].views)
    weight = direction.weight * problem.inverse_temperature
    panels = [_panel(models, writer, weight, slice(start, min(start + size, n))) for start in range(0, n, size)]
    losses, slopes = zip(*panels)
    return torch.cat(losses), torch.cat(slopes)


def _panel(models: tuple[_Model, _Model], writer: GradientWriter | None, weight: torch.Tensor, rows: slice):
    """Losses and slopes (r,) of one panel, whose scratch is free when it returns; its gradients are added where there is a writer."""
    student, teacher = (model.side for model in models)
    cosines = [model.cosines(rows) for model in models]
    launch = dict(zip(("student", "teacher"), (model.launch(cos, rows) for model, cos in zip(models, cosines))))
    launch["positive"] = models[0].view.positive[rows]
    reduced = distil_reduce(*cosines, **launch)
    loss, slope, shares = _finish(reduced, student, teacher, rows)
    if writer is None:
        return loss, slope
    mass = torch.maximum(*shares)
    safe = torch.where(mass > 0, mass, 1)
    factors = [_quotient(share / safe, total) for share, total in zip(shares, (reduced.total_student, reduced.total_teacher))]
    out = torch.empty(cosines[0].shape, dtype=models[0].dtype, device=loss.device)
    gain = FLOAT16_GAIN if out.dtype == torch.float16 else 1.0
    distil_write(*cosines, best=(reduced.best_student, reduced.best_teacher), factors=factors, out=out, gain=gain, **launch)
    del cosines, launch  # which holds them too
    _products(writer, student.direction, rows, out, mass * weight[rows] / gain)
    return loss, slope


def _finish(reduced: Reduction, student: Side, teacher: Side, rows: slice):
    """Losses, slopes at the own targets, and both models' shares (R,) that are not on them."""
    found = []
    for side, best, total in (
        (student, reduced.best_student, reduced.total_student),
        (teacher, reduced.best_teacher, reduced.total_teacher),
    ):
        shift = torch.where(best > -1e29, best * side.direction.blocks[0].scale, float("-inf"))
        found.append(RowSums(torch.where(best.isnan(), best, shift), total, best))
    sums = DistillationSums(*found, reduced.gap)
    loss, slope = finish(sums, student, teacher, rows)
    shares = [torch.sigmoid(x.log_sum() - side.anchor_logit[rows]) for x, side in zip(found, (student, teacher))]
    return loss, slope, shares


def _quotient(share: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return torch.where(total != 0, share / total, 0)


def _products(writer: GradientWriter, direction, rows: slice, slopes: torch.Tensor, factor: torch.Tensor) -> None:
    block = direction.blocks[0]
    if writer.wants_anchors(block):
        writer.anchors(block, rows, matmul(slopes, writer.operand_views(block.columns.operand).unit, writer.problem.dtype), factor)
    if writer.gradients.wants(block.columns.sink):
        writer.columns(block, rows, slopes, factor)
