"""Where a direction's gradients go. The first to write a matrix stores, those after it add: nothing is zeroed beforehand.

Rows of anchors come panel by panel, in order; columns come whole, or in pieces in order (fused). A matrix that is both, as the
queries are among `query_negatives`, starts as zeros.
"""

from __future__ import annotations

import torch

from ..core.problem import EPS
from .kernels.rows import Segments, scatter, update
from .operand_views import norm_scale
from .products import add_scaled_matmul, matmul, row_scaled


class GradientWriter:
    """Adds what one direction contributes to `gradients`, in one pass a row.

    Args:
        problem, direction, gradients: as for the sweep. operand_views: `OperandViews` of the direction.
    """

    def __init__(self, problem, direction, gradients, operand_views):
        self.problem, self.direction, self.gradients, self.operand_views = problem, direction, gradients, operand_views
        self.both = {block.columns.sink for block in direction.blocks} & {block.anchor_sink for block in direction.blocks}
        self.written: dict[str, int] = {}  # rows [0, written) of a matrix hold numbers
        self.taken = {"query": 0, "target": 0}  # rows [0, taken) whose positive's term is in that gradient
        # whether a query's gradient is complete once it is written: nothing else is added to it, and its projection goes along
        self.projects = problem.query.inverse_norm is not None and not problem.options.obstacle("projected_query")

    def wants_anchors(self, block) -> bool:
        return self.gradients.wants(block.anchor_sink) or self.gradients.wants("temperature")

    def anchors(
        self, block, rows: slice, d_anchors: torch.Tensor, factor: torch.Tensor | None, positive: torch.Tensor | None = None
    ) -> None:
        """Add diag(factor) d_anchors (r, D) to the anchors `rows`, None being 1; d_anchors is used up.

        positive: (r,) derivatives with respect to the cosines of these rows' positives; the first block whose anchors are the
        queries takes their own term along.
        """
        gradients, sink, side = self.gradients, block.anchor_sink, self.operand_views(block.anchors)
        want_dot = gradients.wants("temperature")
        own = block.anchors.row_scale
        if own is not None:  # which the anchors carry
            factor = own[rows] if factor is None else factor * own[rows]
        z = side.raw[rows] if want_dot else None
        if sink == "positive" or not gradients.wants(sink):
            dot = update(None, x=d_anchors, a=factor, z=z, dot=True, add=False) if want_dot else None
            if gradients.wants(sink):
                self._scatter(rows, x=d_anchors, a=factor)
        else:
            positive_term = self._own_term(rows, positive) if sink == "query" else {}
            out, add = self._rows(sink, rows, self.problem.query.rows, d_anchors)
            if positive_term and self.projects:
                positive_term |= dict(z_scale=side.scale[rows], eps=EPS)
                z = side.raw[rows]
                gradients.projected.add("query")
            dot = update(out, x=d_anchors, a=factor, z=z, dot=want_dot, add=add, **positive_term)
        if dot is not None:
            # sum_j E_ij cos_ij is x_i . (E Y)_i
            norms = norm_scale(block.anchors)
            gradients.add_temperature(dot if norms is None else dot * norms[rows], rows)

    def _own_term(self, rows: slice, positive) -> dict:
        """q += g t of the rows' positives, as arguments of `update`; once a row."""
        problem = self.problem
        if positive is None or rows.stop <= self.taken["query"]:
            return {}
        self.taken["query"] = rows.stop
        target = self.operand_views(problem.target)
        return dict(y=target.raw, b=problem.times_row_scale(positive, rows), index=problem.positives[rows], y_scale=target.scale)

    def _rows(self, sink: str, rows: slice, count: int, offered: torch.Tensor | None = None) -> tuple[torch.Tensor, bool]:
        """The accumulator's rows, and whether they hold something already; `offered` becomes the accumulator where it can."""
        accumulators = self.gradients.accumulators
        if sink not in self.written:
            if sink in accumulators or sink in self.both:
                self.gradients.of(sink, count)
                self.written[sink] = count
            else:
                usable = offered is not None and len(offered) == count and offered.is_contiguous()
                accumulators[sink] = (
                    offered
                    if usable
                    else torch.empty(count, self.problem.query.width, dtype=self.problem.dtype, device=self.problem.device)
                )
                self.written[sink] = 0
        add = rows.start < self.written[sink]
        self.written[sink] = max(self.written[sink], rows.stop)
        return accumulators[sink][rows], add

    def columns(self, block, rows: slice, e: torch.Tensor, factor: torch.Tensor | None, positive: torch.Tensor | None = None) -> None:
        """Add E^T diag(factor) X, with E (r, C) of the anchors `rows`, to the block's columns; factor None is 1.

        positive: as for `anchors`; where the columns are the targets, their own terms go in first, and the product adds to them:
        it waits for its sums anyway, while a pass of its own would read and write the matrix once more.
        """
        sink, anchors = block.columns.sink, self.operand_views(block.anchors)
        if positive is not None and sink == "target" and rows.stop > self.taken["target"]:
            self._targets_of(rows, positive)
        if factor is None:
            scaled, rest = anchors.unit[rows], None
        else:
            scaled, rest = row_scaled(anchors.raw[rows], factor, None if anchors.scale is None else anchors.scale[rows])
        accumulators = self._all(sink, block.columns.operand.rows)
        if accumulators is not None:
            add_scaled_matmul(accumulators, e.T, scaled, rest)
        else:
            product = matmul(e.T, scaled, self.problem.dtype)
            self.gradients.accumulators[sink] = product if rest is None else product.mul_(rest)

    def column_piece(self, block, columns: slice, piece: torch.Tensor) -> None:
        """Add a piece of the columns' gradients that was computed by itself."""
        out, add = self._rows(block.columns.sink, columns, block.columns.operand.rows, piece)
        if add:
            out.add_(piece)
        elif out.data_ptr() != piece.data_ptr():
            out.copy_(piece)

    def _all(self, sink: str, count: int) -> torch.Tensor | None:
        """The accumulator of a matrix that is written whole, or None where nothing is there yet."""
        if sink in self.gradients.accumulators or sink in self.both:
            return self.gradients.of(sink, count)
        return None

    def _scatter(self, rows: slice, **terms) -> None:
        """Add rows to the targets that they belong to."""
        problem, accumulators = self.problem, self.gradients.accumulators
        out, add = self._all("target", problem.target.rows), True
        if out is None:
            out, add = torch.empty(problem.target.rows, problem.query.width, dtype=problem.dtype, device=problem.device), False
            accumulators["target"] = out
        if problem.step is None:
            segments = Segments.make(problem.positives[rows], problem.target.rows)
        else:
            segments = Segments(rows.stop - rows.start, problem.step, rows.start)
        scatter(out, segments, add=add, **terms)

    def _targets_of(self, rows: slice, positive: torch.Tensor) -> None:
        """t += g q of the rows' positives."""
        query = self.operand_views(self.problem.query)
        self.taken["target"] = rows.stop
        positive = self.problem.times_row_scale(positive, rows)
        self._scatter(rows, y=query.raw[rows], b=positive, y_scale=None if query.scale is None else query.scale[rows])

    def positives(self, coefficient: torch.Tensor) -> None:
        """The positives' own terms, as far as `anchors` and `columns` have not taken them: q += g t, t += g q; g (n,) is per cosine."""
        problem, gradients = self.problem, self.gradients
        all_rows = slice(0, problem.query.rows)
        if gradients.wants("temperature"):
            gradients.add_temperature(coefficient * self.direction.positive)
        if gradients.wants("query") and not self.taken["query"]:
            positive_term = self._own_term(all_rows, coefficient)
            out, add = self._rows("query", all_rows, problem.query.rows)
            update(out, add=add, **positive_term)
        if gradients.wants("target") and not self.taken["target"]:
            self._targets_of(all_rows, coefficient)
