"""The matrices of a direction as the kernels take them: stored rows, norms beside them, one view a block of candidates."""

from __future__ import annotations

import torch

from ..core.operands import Operand
from .kernels.norms import scaled
from .panel_sums import BlockView


def stored(operand: Operand, dtype: torch.dtype) -> torch.Tensor:
    """An operand's rows in the type that the products take; rows that are no candidates come out as zeros.

    Norms are not applied: they go into the epilogue, where they are exact.
    """
    rows = operand.source if operand.index is None else operand.source[operand.index]
    if operand.keep is not None:
        keep = operand.keep if operand.index is None else operand.keep[operand.index]
        rows = torch.where(keep[:, None], rows, rows.new_zeros(()))
    rows = rows.to(dtype)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def tight(vector: torch.Tensor | None) -> torch.Tensor | None:
    """A vector as the kernels read it, element after element: they take its pointer and no stride."""
    return None if vector is None else vector.contiguous()


def norm_scale(operand: Operand) -> torch.Tensor | None:
    """(rows,) inverse norms of an operand's rows, or None."""
    if operand.inverse_norm is None or operand.index is None:
        return tight(operand.inverse_norm)
    return operand.inverse_norm[operand.index]


def inverse(operand: Operand) -> torch.Tensor | None:
    """(rows,) all that multiplies a row: inverse norms and the rows' own factors; None for neither."""
    norms = norm_scale(operand)
    if operand.row_scale is None:
        return norms
    return operand.row_scale if norms is None else norms * operand.row_scale


class OperandView:
    """A matrix of the products, made once a direction: raw rows for the logits, unit rows for the gradients."""

    def __init__(self, operand: Operand, dtype: torch.dtype):
        self.raw = stored(operand, dtype)
        self.scale = inverse(operand)
        self._unit = None

    @property
    def unit(self) -> torch.Tensor:
        if self._unit is None:
            self._unit = self.raw if self.scale is None else scaled(self.raw, self.scale)
        return self._unit


class OperandViews:
    """Every matrix of a direction once, and a `BlockView` a block of candidates."""

    def __init__(self, direction, dtype: torch.dtype):
        self.dtype = dtype
        self._held: dict[int, OperandView] = {}
        self.views = [self._view(block, direction) for block in direction.blocks]

    def __call__(self, operand: Operand) -> OperandView:
        key = id(operand)  # the direction keeps its operands alive
        if key not in self._held:
            self._held[key] = OperandView(operand, self.dtype)
        return self._held[key]

    def _view(self, block, direction) -> BlockView:
        anchors, columns = self(block.anchors), self(block.columns.operand)
        col_scale = columns.scale
        if anchors.scale is not None and col_scale is None:  # the kernels take both or neither
            col_scale = torch.ones_like(columns.raw[:, 0], dtype=anchors.scale.dtype)
        return BlockView(
            anchors.raw,
            columns.raw,
            block.scale,
            tight(block.exclude),
            tuple((tight(row), tight(col)) for row, col in block.ids),
            tight(direction.threshold),
            tight(block.columns.keep),
            block.columns.offset or 0,
            anchors.scale,
            col_scale,
        )
