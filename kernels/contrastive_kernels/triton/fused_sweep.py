"""A direction with the fused kernels of `fused.py`: nothing of size rows x candidates is ever stored.

The forward leaves, beside the sums, every anchor's gradient up to a factor that is known when the row's sums are complete; rows and
columns are taken in pieces, so that partial results stay within the workspace. O(N + M) numbers are kept between the passes.
"""

from __future__ import annotations

import torch

from contrastive_kernels.softmax import RowSums, row_factor
from contrastive_kernels.triton.fused import FusedSums, fused_backward, fused_forward


def _sums(work, view, rows: slice, weighted: bool) -> FusedSums:
    """One block's sums of some rows; rows that do not see the blocks come out empty."""
    out = fused_forward(view.x[rows], view.y, scale=view.scale, weighted=weighted, **view.options(rows))
    inactive = work.inactive(rows)
    if inactive is not None:
        out.shift, out.best = (torch.where(inactive, float("-inf"), x) for x in (out.shift, out.best))
        out.total = torch.where(inactive, 0.0, out.total)
    return out


def forward(work, sums: RowSums, *, finished: bool) -> None:
    """Add every row's sums to `sums`; with `finished` these rows' sums are then complete, and their anchors' gradients are added."""
    gradients = work.gradients if finished else None
    for rows in work:
        made = []
        for block, view in zip(work.direction.blocks, work.views):
            weighted = gradients is not None and work.writer.wants_anchors(block)
            made.append(_sums(work, view, rows, weighted))
            sums.add(rows, RowSums(made[-1].shift, made[-1].total, made[-1].best))
        if gradients is not None:
            _add_anchors(work, rows, made, sums, work.positive_term(rows, sums))


def anchors(work, sums: RowSums) -> None:
    """The anchors' gradients alone, from sums that were completed elsewhere (a ring's)."""
    for rows in work:
        made = [_sums(work, view, rows, work.writer.wants_anchors(block)) for block, view in zip(work.direction.blocks, work.views)]
        _add_anchors(work, rows, made, sums, None)


def _factor(work, sums: RowSums, rows: slice) -> torch.Tensor:
    """What turns exp(logit - sums.shift) into the derivative with respect to a cosine."""
    own = sums.rows(rows)
    return row_factor(own, work.logit[rows], own.shift) * work.direction.weight[rows] * work.problem.inverse_temperature


def _add_anchors(work, rows: slice, made: list[FusedSums], sums: RowSums, positive) -> None:
    own, factor = sums.rows(rows), _factor(work, sums, rows)
    for block, part in zip(work.direction.blocks, made):
        if part.weighted is None:
            continue
        relative = torch.where(part.total > 0, (part.shift - own.shift).exp(), 0.0)
        work.writer.anchors(block, rows, part.weighted, factor * relative, positive)


def backward(work, sums: RowSums) -> None:
    """Add the candidates' gradients; `sums` are complete."""
    everyone = slice(0, work.rows)
    factor = _factor(work, sums, everyone)
    part = sums.total > 0
    if work.direction.active is not None:
        part = part & work.direction.active
    shift = torch.where(part, sums.shift, float("inf"))
    for block, view in zip(work.direction.blocks, work.views):
        if not work.gradients.wants(block.columns.sink):
            continue
        for start in range(0, len(view.y), work.size):
            columns = slice(start, min(start + work.size, len(view.y)))
            piece = fused_backward(view.x, view.y[columns], scale=view.scale, shift=shift, factor=factor, **view.options(everyone, columns))
            work.writer.column_piece(block, columns, piece)
