"""The sweep over panels of rows with the Triton kernels: what `contrastive_kernels.panels.sweep` does in plain torch.

    E = exp(s - shift) of a panel, its sums        one launch a block (and one that mends unsafe rows)
    d_anchors  = diag(f) (E Y)                      library
    d_candidates += E^T (diag(f) X)                 library              f = weight * p_negatives / sum(E) / temperature

E is written once and read twice, in the type of the inputs. Saved state is O(N + M); scratch stays within the workspace. float16,
label smoothing, and float32 on CUDA (whose library product is faster than ours without tensor cores) take float32 logits instead.
"""

from __future__ import annotations

import torch

from contrastive_kernels.operands import Operand
from contrastive_kernels.softmax import RowSums, finish, row_factor
from contrastive_kernels.triton import panel as panels
from contrastive_kernels.triton.common import INTERPRET, check_dtype
from contrastive_kernels.triton.panel import BlockView, PanelSums
from contrastive_kernels.triton.products import add_scaled_matmul, matmul, row_scaled

MIB = 1 << 20
ROW_QUANTUM = 128  # rows of a panel come in whole tiles


def path_for(dtype: torch.dtype, smoothing: float) -> str:
    """"exp" or "chunk", see the module's first lines."""
    if smoothing or dtype == torch.float16 or (dtype == torch.float32 and not INTERPRET):
        return "chunk"
    return "exp"


def stored(operand: Operand) -> torch.Tensor:
    """An operand's rows in the type that the products take, as they are stored; rows that are no candidates come out as zeros.

    Norms are not applied: they go into the epilogue, where they are exact.
    """
    rows = operand.source if operand.index is None else operand.source[operand.index]
    if operand.keep is not None:
        keep = operand.keep if operand.index is None else operand.keep[operand.index]
        rows = torch.where(keep[:, None], rows, rows.new_zeros(()))
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def inverse(operand: Operand) -> torch.Tensor | None:
    if operand.inverse_norm is None or operand.index is None:
        return operand.inverse_norm
    return operand.inverse_norm[operand.index]


class Side:
    """A matrix of the products, made once a direction: raw rows for the logits, unit rows for the gradients."""

    def __init__(self, operand: Operand):
        self.raw = stored(operand)
        self.scale = inverse(operand)
        self._unit = None

    @property
    def unit(self) -> torch.Tensor:
        if self._unit is None:
            self._unit = self.raw if self.scale is None else (self.raw * self.scale[:, None]).to(self.raw.dtype)
        return self._unit

    def unit_rows(self, rows: slice) -> torch.Tensor:
        """Some unit rows in the accumulator's type, before any rounding to the products' type."""
        return self.raw[rows] if self.scale is None else self.raw[rows] * self.scale[rows, None]


def panel_rows(rows: int, columns: int, width: int, itemsize: int, path: str, workspace: int) -> int:
    """Rows whose E (and float32 logits on the chunk path), partial sums and products fit in `workspace` bytes."""
    each = columns * (itemsize + (4 if path == "chunk" else 4 / 64)) + width * (4 + 2 * itemsize)
    count = int(workspace // each)
    if count < 1:
        raise ValueError(
            f"workspace_mib: expected room for one row of {columns} exponentials ({each / MIB:.2f} MiB), "
            f"got {workspace / MIB:.2f} MiB; raise workspace_mib"
        )
    if count >= rows:
        return rows
    return count if count < ROW_QUANTUM else count // ROW_QUANTUM * ROW_QUANTUM


def sweep(problem, direction, hard, gradients, workspace: int, want_best: bool):
    """Reduce every row of `direction` and add its gradients. Returns (RowResult, RowSums) of all rows, (n,) each.

    Arguments are those of `contrastive_kernels.panels.sweep`. Raises ValueError for a dtype that the kernels do not take.
    """
    dtype = problem.query.source.dtype
    check_dtype("query", dtype)
    smoothing = problem.options.label_smoothing
    path = path_for(dtype, smoothing)
    sides: dict[int, Side] = {}

    def side(operand: Operand) -> Side:
        return sides.setdefault(id(operand), Side(operand))

    views = [_view(block, side, direction, problem) for block in direction.blocks]
    n, device = problem.query.rows, problem.device
    columns = sum(len(view.y) for view in views)
    size = panel_rows(n, columns, problem.query.width, dtype.itemsize, path, workspace)
    buffers = [torch.empty(size * len(view.y), dtype=dtype, device=device) for view in views]
    sums = RowSums.empty(n, problem.dtype, device, bool(smoothing))
    if hard is not None:
        sums.add(slice(0, n), hard.sums)
    logit = direction.positive * problem.inverse_temperature
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        outs = [buffer[: (rows.stop - start) * len(v.y)].view(rows.stop - start, len(v.y)) for buffer, v in zip(buffers, views)]
        if path == "exp":
            here = panels.exponentials(views, rows, outs, direction.active, want_best=want_best, bounded=False)
            sums.add(rows, _row_sums(here, smoothing))
            factor = row_factor(sums.rows(rows), logit[rows], here.shift) * direction.weight[rows]
        else:
            cosine = panels.cosines(views, rows, problem.dtype)
            here = panels.reduce_cosines(views, rows, cosine, direction.active, smoothing=bool(smoothing))
            sums.add(rows, _row_sums(here, smoothing))
            if gradients is not None:
                factor = _write(views, rows, cosine, outs, sums, logit, direction, smoothing, dtype)
            del cosine
        if gradients is not None:
            _products(direction.blocks, views, side, rows, outs, factor * problem.inverse_temperature, gradients, problem)
    result = finish(sums, logit, smoothing)
    if gradients is not None:
        gradients.add_positives(direction, result.positive * direction.weight * problem.inverse_temperature)
    return result, sums


def _view(block, side, direction, problem) -> BlockView:
    anchors, columns = side(block.anchors), side(block.columns.operand)
    return BlockView(
        anchors.raw, columns.raw, block.scale, block.exclude, tuple(block.ids), direction.threshold, block.columns.keep,
        block.columns.offset or 0, anchors.scale, columns.scale,
    )


def _row_sums(here: PanelSums, smoothing) -> RowSums:
    shift = torch.where(here.total > 0, here.shift, float("-inf"))
    best = torch.full_like(shift, float("-inf")) if here.best is None else here.best
    return RowSums(shift, here.total, best, here.logits, here.count)


def _write(views, rows, cosine, outs, sums, logit, direction, smoothing, dtype) -> torch.Tensor:
    """Write what the products need, from the float32 logits; returns the row factors that belong to it."""
    own = sums.rows(rows)
    done = finish(own, logit[rows], smoothing)
    gain = panels.FLOAT16_GAIN if dtype == torch.float16 else 1.0
    inactive = None if direction.active is None else ~direction.active[rows]
    if not smoothing:
        shift = torch.where(own.total > 0, own.shift, float("inf"))
        factor = row_factor(own, logit[rows], own.shift) * direction.weight[rows] / gain
        a, b = torch.full_like(shift, gain), None
    else:
        # derivative with respect to the logit itself: exp(logit - lse) - smoothing / candidates
        shift, factor = done.lse, direction.weight[rows] / gain
        a, b = torch.full_like(shift, gain), done.smooth * gain
        b = b if inactive is None else torch.where(inactive, 0.0, b)
    if inactive is not None:
        shift = torch.where(inactive, float("inf"), shift)
    panels.write_exponentials(views, rows, cosine, outs, shift, a=a, b=b)
    return factor


def _products(blocks, views, side, rows, outs, factor, gradients, problem) -> None:
    """dA = diag(factor) (E B) and dB += E^T (diag(factor) A), for every block of one panel."""
    for block, view, e in zip(blocks, views, outs):
        anchors, columns = side(block.anchors), side(block.columns.operand)
        if gradients.wants(block.anchor_sink) or gradients.wants("temperature"):
            d_anchors = matmul(e, columns.unit, problem.dtype).mul_(factor[:, None])
            if gradients.wants("temperature"):
                # sum_j E_ij cos_ij is x_i . (E Y)_i
                gradients.temperature += torch.linalg.vecdot(d_anchors, anchors.unit_rows(rows).to(problem.dtype)).sum()
            if gradients.wants(block.anchor_sink):
                gradients.add_anchors(block.anchor_sink, rows.start, rows.stop, d_anchors)
            del d_anchors
        if gradients.wants(block.columns.sink):
            scaled, rest = row_scaled(anchors.raw[rows], factor if anchors.scale is None else factor * anchors.scale[rows])
            add_scaled_matmul(gradients.of(block.columns.sink, block.columns.operand.rows), e.T, scaled, rest)
