"""A direction with the fused kernels of `fused.py`: nothing of size rows x candidates is ever stored.

The forward leaves, beside the sums, every anchor's gradient up to a factor that is known when the row's sums are complete; rows and
columns are taken in pieces, so that partial results stay within the workspace. O(N + M) numbers are kept between the passes.
"""

from __future__ import annotations

import torch

from .kernels.fused import FusedSums, fused_backward, fused_forward
from .kernels.row_state import Parts, RowState


def _sums(panel_sweep, rows: slice, wants_anchors) -> list[FusedSums]:
    """Every block's sums of some rows."""
    blocks, views = panel_sweep.direction.blocks, panel_sweep.views
    return [
        fused_forward(view.x[rows], view.y, scale=panel_sweep.exponent, weighted=wants_anchors(block), **view.options(rows))
        for block, view in zip(blocks, views)
    ]


def forward(panel_sweep, state: RowState, *, prior: bool, complete: bool) -> None:
    """Add every row's sums to the state's; where they are then `complete`, the rows are worked out and their anchors' gradients added."""
    gradients = panel_sweep.gradients if complete else None
    for rows in panel_sweep:
        sums = _sums(panel_sweep, rows, (lambda block: False) if gradients is None else panel_sweep.writer.wants_anchors)
        parts = [Parts(part.total[None], part.shift, part.best[None]) for part in sums]
        panel_sweep.add(state, rows, parts, prior=prior, complete=complete, own_shift=True)
        if gradients is not None:
            _add_anchors(panel_sweep, rows, sums, state, state.positive[rows])


def anchors(panel_sweep, state: RowState) -> None:
    """The anchors' gradients alone, from sums that were completed elsewhere (a ring's)."""
    for rows in panel_sweep:
        _add_anchors(panel_sweep, rows, _sums(panel_sweep, rows, panel_sweep.writer.wants_anchors), state, None)


def _add_anchors(panel_sweep, rows: slice, sums: list[FusedSums], state: RowState, positive) -> None:
    for block, part in zip(panel_sweep.direction.blocks, sums):
        if part.weighted is None:
            continue
        # +inf where a row has no part: its factor becomes 0
        relative = torch.where(part.total != 0, (part.shift - state.shift[rows]).exp(), 0.0)
        panel_sweep.writer.anchors(block, rows, part.weighted, state.factor[rows] * relative, positive)


def backward(panel_sweep, state: RowState) -> None:
    """Add the candidates' gradients; the rows are worked out."""
    all_rows = slice(0, panel_sweep.rows)
    for block, view in zip(panel_sweep.direction.blocks, panel_sweep.views):
        if not panel_sweep.gradients.wants(block.columns.sink):
            continue
        for start in range(0, len(view.y), panel_sweep.size):
            columns = slice(start, min(start + panel_sweep.size, len(view.y)))
            piece = fused_backward(
                view.x,
                view.y[columns],
                scale=panel_sweep.exponent,
                shift=state.shift,
                factor=state.factor,
                **view.options(all_rows, columns),
            )
            panel_sweep.writer.column_piece(block, columns, piece)
