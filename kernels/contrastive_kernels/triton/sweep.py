"""The sweep over panels of rows with the Triton kernels: what `contrastive_kernels.eager.sweep.sweep` does in plain torch.

    E = exp(s - shift) of a panel, its sums        one launch a block (and two that mend unsafe rows)
    rows' sums, losses and factors f               one launch (row_state.py)
    d_anchors  = diag(f) (E Y)                      library
    d_candidates += E^T (diag(f) X)                 library              f = weight * p_negatives / sum(E) / temperature

E is written once and read twice, in the type of the inputs. Saved state is O(N + M); scratch stays within the workspace. Which of
the ways of `dispatch.py` is taken is decided there; "fused" has a file of its own.
"""

from __future__ import annotations

import functools

import torch

from .. import dispatch
from . import configs, dense, fused_sweep
from . import panel_sums as panels
from .gradient_writer import GradientWriter
from .kernels.common import INTERPRET, check_dtype, scalar
from .kernels.row_state import Parts, RowState, finish
from .operand_views import OperandViews
from .products import matmul


def plan_for(problem, direction, gradients, workspace: int) -> dispatch.Plan:
    """What `dispatch.plan` says about a direction on the device at hand; an H100 stands in for the interpreter's CPU."""
    source = problem.query.source
    wants = (lambda name: False) if gradients is None else gradients.wants
    masks = direction.threshold is not None or any(block.ids or block.columns.keep is not None for block in direction.blocks)
    return dispatch.plan(
        problem.query.rows,
        sum(block.width for block in direction.blocks),
        problem.query.width,
        problem.product_dtype,
        workspace=workspace,
        gpu=configs.gpu(source.device),
        smoothing=bool(problem.options.label_smoothing),
        normalize=problem.query.inverse_norm is not None or problem.row_scale is not None,
        interpreted=INTERPRET,
        d_query=wants("temperature") or any(wants(block.anchor_sink) for block in direction.blocks),
        d_target=any(wants(block.columns.sink) for block in direction.blocks),
        masks=masks,
        bounded=bounded(problem, direction),
        best=problem.options.return_stats and direction.forward,
        plain=dense.plain(problem, direction, gradients),
    )


def bounded(problem, direction) -> bool:
    """Whether no |logit| can exceed LARGEST_LOGIT, known without a look at the device: rows normalised here, the temperature a number."""
    scale = direction.blocks[0].scale
    known = problem.query.inverse_norm is not None and not isinstance(scale, torch.Tensor)
    return known and scale * panels.ROUNDING <= panels.LARGEST_LOGIT


class PanelSweep:
    """Views, buffers and plan of one direction, and what is done to a panel of its rows.

    Args: those of `contrastive_kernels.eager.sweep.sweep`. Raises ValueError for a dtype that the kernels do not take.
    """

    def __init__(self, problem, direction, gradients, workspace: int):
        self.dtype = problem.product_dtype
        check_dtype("query", self.dtype)
        self.problem, self.direction, self.gradients = problem, direction, gradients
        self.plan = plan_for(problem, direction, gradients, workspace)
        self.path, self.size = self.plan.path, self.plan.rows
        self.rows = problem.query.rows
        self.smoothing = problem.options.label_smoothing
        self.scale = direction.blocks[0].scale  # every block of a direction has the same
        self.bounded = bounded(problem, direction)
        self._buffers = None

    def __iter__(self):
        return (slice(a, min(a + self.size, self.rows)) for a in range(0, self.rows, self.size))

    @functools.cached_property
    def operand_views(self) -> OperandViews:
        return OperandViews(self.direction, self.dtype)

    @functools.cached_property
    def writer(self) -> GradientWriter | None:
        return None if self.gradients is None else GradientWriter(self.problem, self.direction, self.gradients, self.operand_views)

    @property
    def views(self):
        return self.operand_views.views

    @functools.cached_property
    def exponent(self) -> torch.Tensor:
        """0-d: logit per cosine."""
        return scalar(self.scale, self.problem.dtype, self.problem.device)

    @functools.cached_property
    def inverse_temperature(self) -> torch.Tensor:
        """0-d: the positives' logit per cosine, `exponent` without hardness."""
        inverse = self.problem.inverse_temperature
        same = self.scale is inverse or (isinstance(self.scale, float) and self.scale == inverse)
        return self.exponent if same else scalar(inverse, self.problem.dtype, self.problem.device)

    @functools.cached_property
    def fixed_shift(self) -> torch.Tensor:
        """(n,) what the exponentials of the first launch are relative to."""
        return panels.fixed_shift(self.scale, self.rows, self.problem.dtype, self.problem.device, self.direction.active)

    @property
    def gain(self) -> float:
        """How many times greater float16 exponentials are written than they are, relative to a row's own maximum."""
        return panels.FLOAT16_GAIN if self.dtype == torch.float16 and self.path == "chunk" else 1.0

    def state(self, hard) -> tuple[RowState, bool]:
        """The rows' state, and whether it holds sums already: those of hard negatives."""
        state = RowState.unfilled(self.rows, self.problem.dtype, self.problem.device, self.smoothing)
        if hard is not None:
            state.load(hard.sums)
        return state, hard is not None

    def outs(self, rows: slice) -> list[torch.Tensor]:
        """(R, C_b) scratch for every block, the same memory for every panel."""
        count = rows.stop - rows.start
        if self._buffers is None:
            self._buffers = [torch.empty(self.size * len(view.y), dtype=self.dtype, device=self.problem.device) for view in self.views]
        return [buffer[: count * len(view.y)].view(count, len(view.y)) for buffer, view in zip(self._buffers, self.views)]

    def add(self, state: RowState, rows: slice, parts: list[Parts], *, prior: bool, complete: bool, own_shift: bool = False) -> None:
        """Take a panel's partial sums into the rows' state, one block's after another; `complete` works the rows out."""
        for i, part in enumerate(parts):
            last = complete and i == len(parts) - 1
            finish(
                state,
                rows,
                part,
                self.direction,
                self.inverse_temperature if last else None,
                prior=prior or i > 0,
                own_shift=own_shift,
                gain=self.gain,
            )

    def exponentials(self, rows: slice, outs, want_best: bool) -> Parts:
        return panels.exponentials(self.views, rows, outs, self.fixed_shift, self.exponent, want_best=want_best, bounded=self.bounded)

    def reduced(self, rows: slice, cosine) -> list[Parts]:
        return panels.reduce_cosines(self.views, rows, cosine, self.exponent, smoothing=bool(self.smoothing))

    def write(self, rows: slice, cosine, outs, state: RowState) -> None:
        """Write from float32 logits what the products need, the rows being worked out with their own shift."""
        smooth = state.smooth[rows] if self.smoothing else None
        panels.write_exponentials(self.views, rows, cosine, outs, state.shift[rows], self.exponent, gain=self.gain, smooth=smooth)

    def products(self, rows: slice, outs, factor, positive=None) -> None:
        """dA = diag(factor) (E B) and dB += E^T (diag(factor) A), for every block of one panel."""
        for block, e in zip(self.direction.blocks, outs):
            if self.writer.wants_anchors(block):
                d_anchors = matmul(e, self.operand_views(block.columns.operand).unit, self.problem.dtype)
                self.writer.anchors(block, rows, d_anchors, factor, positive)
                del d_anchors
            if self.gradients.wants(block.columns.sink):
                self.writer.columns(block, rows, e, factor, positive)


def sweep(problem, direction, hard, gradients, workspace: int, want_best: bool):
    """Reduce every row of `direction` and add its gradients. Returns (RowResult, RowSums) of all rows, (n,) each.

    Arguments are those of `contrastive_kernels.eager.sweep.sweep`. Raises ValueError for a dtype that the kernels do not take.
    """
    panel_sweep = PanelSweep(problem, direction, gradients, workspace)
    if panel_sweep.path == "dense":
        return dense.sweep(problem, direction, gradients, panel_sweep.inverse_temperature), None
    state, prior = panel_sweep.state(hard)
    if panel_sweep.path == "fused":
        fused_sweep.forward(panel_sweep, state, prior=prior, complete=True)
        if gradients is not None:
            fused_sweep.backward(panel_sweep, state)
    else:
        for rows in panel_sweep:
            _panel(panel_sweep, rows, state, prior, want_best)
    if gradients is not None:
        panel_sweep.writer.positives(state.positive)
    return state.result(), state.sums


def _panel(panel_sweep: PanelSweep, rows: slice, state: RowState, prior: bool, want_best: bool) -> None:
    """One panel: its sums, and its gradients while its exponentials are there."""
    gradients = panel_sweep.gradients
    if panel_sweep.path == "exp":
        outs = panel_sweep.outs(rows) if gradients is not None else [None] * len(panel_sweep.views)
        panel_sweep.add(state, rows, [panel_sweep.exponentials(rows, outs, want_best)], prior=prior, complete=True)
    else:
        cosine = panels.cosines(panel_sweep.views, rows, panel_sweep.problem.dtype)
        panel_sweep.add(state, rows, panel_sweep.reduced(rows, cosine), prior=prior, complete=True, own_shift=True)
        if gradients is None:
            return
        outs = panel_sweep.outs(rows)
        panel_sweep.write(rows, cosine, outs, state)
        del cosine
    if gradients is not None:
        panel_sweep.products(rows, outs, state.factor[rows], state.positive[rows])
