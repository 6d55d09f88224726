"""The sweep over panels of rows with the Triton kernels: what `contrastive_kernels.panels.sweep` does in plain torch.

    E = exp(s - shift) of a panel, its sums        one launch a block (and one that mends unsafe rows)
    d_anchors  = diag(f) (E Y)                      library
    d_candidates += E^T (diag(f) X)                 library              f = weight * p_negatives / sum(E) / temperature

E is written once and read twice, in the type of the inputs. Saved state is O(N + M); scratch stays within the workspace. Which of
the ways of `dispatch.py` is taken is decided there; "fused" has a file of its own.
"""

from __future__ import annotations

import torch

from contrastive_kernels import dispatch, roofline
from contrastive_kernels.softmax import RowSums, finish, row_factor
from contrastive_kernels.triton import configs, fused_sweep
from contrastive_kernels.triton import panel as panels
from contrastive_kernels.triton.common import INTERPRET, check_dtype
from contrastive_kernels.triton.panel import PanelSums
from contrastive_kernels.triton.products import matmul
from contrastive_kernels.triton.sides import Sides
from contrastive_kernels.triton.writer import Writer


def plan_for(problem, direction, gradients, workspace: int) -> dispatch.Plan:
    """What `dispatch.plan` says about a direction on the device at hand; an H100 stands in for the interpreter's CPU."""
    source = problem.query.source
    wants = (lambda name: False) if gradients is None else gradients.wants
    return dispatch.plan(
        problem.query.rows, sum(block.width for block in direction.blocks), problem.query.width, problem.product_dtype, workspace=workspace,
        gpu=roofline.for_arch(configs.architecture(source.device) or 90), smoothing=bool(problem.options.label_smoothing),
        normalize=problem.query.inverse_norm is not None, interpreted=INTERPRET,
        d_query=wants("temperature") or any(wants(block.anchor_sink) for block in direction.blocks),
        d_target=any(wants(block.columns.sink) for block in direction.blocks),
    )


class Panels:
    """Views, buffers and plan of one direction, and what is done to a panel of its rows.

    Args: those of `contrastive_kernels.panels.sweep`. Raises ValueError for a dtype that the kernels do not take.
    """

    def __init__(self, problem, direction, gradients, workspace: int):
        self.dtype = problem.product_dtype
        check_dtype("query", self.dtype)
        self.problem, self.direction, self.gradients = problem, direction, gradients
        self.plan = plan_for(problem, direction, gradients, workspace)
        self.path, self.size = self.plan.path, self.plan.rows
        self.sides = Sides(direction, self.dtype)
        self.writer = None if gradients is None else Writer(problem, direction, gradients, self.sides)
        self.views, self.rows = self.sides.views, problem.query.rows
        self.smoothing = problem.options.label_smoothing
        self.logit = direction.positive * problem.inverse_temperature
        # known without a look at the device: cosines of rows that are normalised here, a temperature that is a number
        scales = [block.scale for block in direction.blocks]
        known = problem.query.inverse_norm is not None and not any(isinstance(scale, torch.Tensor) for scale in scales)
        self.bounded = known and max(scales) * panels.ROUNDING <= panels.LARGEST_LOGIT
        self._buffers = None

    def __iter__(self):
        return (slice(a, min(a + self.size, self.rows)) for a in range(0, self.rows, self.size))

    def outs(self, rows: slice) -> list[torch.Tensor]:
        """(R, C_b) scratch for every block, the same memory for every panel."""
        count = rows.stop - rows.start
        if self._buffers is None:
            self._buffers = [torch.empty(self.size * len(view.y), dtype=self.dtype, device=self.problem.device) for view in self.views]
        return [buffer[: count * len(view.y)].view(count, len(view.y)) for buffer, view in zip(self._buffers, self.views)]

    def inactive(self, rows: slice) -> torch.Tensor | None:
        return None if self.direction.active is None else ~self.direction.active[rows]

    def write(self, rows: slice, cosine, outs, sums: RowSums) -> torch.Tensor:
        """Write from float32 logits what the products need, the rows' sums being complete; returns the factors that belong to it."""
        own, weight = sums.rows(rows), self.direction.weight[rows]
        gain = panels.FLOAT16_GAIN if self.dtype == torch.float16 else 1.0
        inactive = self.inactive(rows)
        if not self.smoothing:
            shift = torch.where(own.total > 0, own.shift, float("inf"))
            factor = row_factor(own, self.logit[rows], own.shift) * weight / gain
            a, b = torch.full_like(shift, gain), None
        else:
            # derivative with respect to the logit itself: exp(logit - lse) - smoothing / candidates
            done = finish(own, self.logit[rows], self.smoothing)
            shift, factor = done.lse, weight / gain
            a, b = torch.full_like(shift, gain), done.smooth * gain
            b = b if inactive is None else torch.where(inactive, 0.0, b)
        if inactive is not None:
            shift = torch.where(inactive, float("inf"), shift)
        panels.write_exponentials(self.views, rows, cosine, outs, shift, a=a, b=b)
        return factor

    def positive_term(self, rows: slice, sums: RowSums) -> torch.Tensor:
        """(r,) derivative with respect to the cosine of the rows' positives, their sums being complete."""
        done = finish(sums.rows(rows), self.logit[rows], self.smoothing)
        return done.positive * self.direction.weight[rows] * self.problem.inverse_temperature

    def products(self, rows: slice, outs, factor, positive=None) -> None:
        """dA = diag(factor) (E B) and dB += E^T (diag(factor) A), for every block of one panel."""
        for block, e in zip(self.direction.blocks, outs):
            if self.writer.wants_anchors(block):
                d_anchors = matmul(e, self.sides(block.columns.operand).unit, self.problem.dtype)
                self.writer.anchors(block, rows, d_anchors, factor, positive)
                del d_anchors
            if self.gradients.wants(block.columns.sink):
                self.writer.columns(block, rows, e, factor, positive)


def row_sums(here: PanelSums) -> RowSums:
    shift = torch.where(here.total > 0, here.shift, float("-inf"))
    best = torch.full_like(shift, float("-inf")) if here.best is None else here.best
    return RowSums(shift, here.total, best, here.logits, here.count)


def sweep(problem, direction, hard, gradients, workspace: int, want_best: bool):
    """Reduce every row of `direction` and add its gradients. Returns (RowResult, RowSums) of all rows, (n,) each.

    Arguments are those of `contrastive_kernels.panels.sweep`. Raises ValueError for a dtype that the kernels do not take.
    """
    work = Panels(problem, direction, gradients, workspace)
    sums = RowSums.empty(work.rows, problem.dtype, problem.device, bool(work.smoothing))
    if hard is not None:
        sums.add(slice(0, work.rows), hard.sums)
    if work.path == "fused":
        fused_sweep.forward(work, sums, finished=True)
        if gradients is not None:
            fused_sweep.backward(work, sums)
    else:
        for rows in work:
            _panel(work, rows, sums, want_best)
    result = finish(sums, work.logit, work.smoothing)
    if gradients is not None:
        work.writer.positives(result.positive * direction.weight * problem.inverse_temperature)
    return result, sums


def _panel(work: Panels, rows: slice, sums: RowSums, want_best: bool) -> None:
    """One panel: its sums, and its gradients while its exponentials are there."""
    problem, direction = work.problem, work.direction
    if work.path == "exp":
        outs = work.outs(rows) if work.gradients is not None else [None] * len(work.views)
        here = panels.exponentials(work.views, rows, outs, direction.active, want_best=want_best, bounded=work.bounded)
        sums.add(rows, row_sums(here))
        factor = row_factor(sums.rows(rows), work.logit[rows], here.shift) * direction.weight[rows]
    else:
        cosine = panels.cosines(work.views, rows, problem.dtype)
        sums.add(rows, row_sums(panels.reduce_cosines(work.views, rows, cosine, direction.active, smoothing=bool(work.smoothing))))
        if work.gradients is None:
            return
        outs = work.outs(rows)
        factor = work.write(rows, cosine, outs, sums)
        del cosine
    if work.gradients is not None:
        work.products(rows, outs, factor * problem.inverse_temperature, work.positive_term(rows, sums))
