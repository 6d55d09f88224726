"""One sweep over panels of rows, in plain torch: value and gradients in 6 N M D FLOP, never N x M.

A panel of R rows sees every candidate of its rows, so its softmax is complete when its products are formed:

    S = scale * A B^T   ->  E = exp(S - shift), sums  ->  dA = diag(a) (E B),  dB += E^T (diag(a) A),  a = w (1 - p_pos) / sum(E) / T

with a the row's factor folded into the smaller operand, so that E is written once and read twice (12 bytes an element in
float32). Rows are reduced in sub-panels that stay near the cache. Scratch is O(R (sum of columns) + R D), within the
workspace; GEMMs write into it with out=.
"""

from __future__ import annotations

import torch

from contrastive_kernels.hard import HardNegatives
from contrastive_kernels.operands import TILE_BYTES, Operand, scatter_rows
from contrastive_kernels.problem import Direction, Problem
from contrastive_kernels.softmax import SAFE_LOGIT, RowSums, finish, mask_logits, reduce_logits

SUB_PANEL_BYTES = 4 << 20
MIB = 1 << 20


class Gradients:
    """Accumulators in the compute dtype, by name, made when first written; a name that is not wanted swallows writes."""

    def __init__(self, problem: Problem, wanted: frozenset[str]):
        self.problem, self.wanted = problem, wanted
        self.held: dict[str, torch.Tensor] = {}
        self.temperature = torch.zeros((), dtype=problem.dtype, device=problem.device)

    def wants(self, name: str) -> bool:
        return {"all_queries": "query", "positive": "target"}.get(name, name) in self.wanted

    def of(self, name: str) -> torch.Tensor:
        if name not in self.held:
            operand = {"query": self.problem.query, "all_queries": self.problem.all_queries, "target": self.problem.target}[name]
            self.held[name] = torch.zeros(operand.rows, operand.width, dtype=operand.dtype, device=self.problem.device)
        return self.held[name]

    def add_rows(self, name: str, start: int, stop: int, rows: torch.Tensor) -> None:
        """Add gradients of rows [start, stop) of the anchors called `name`."""
        if name == "positive":
            scatter_rows(self.of("target"), self.problem.positives[start:stop], rows)
        else:
            self.of(name)[start:stop].add_(rows)


def panel_rows(direction: Direction, rows: int, workspace: int) -> int:
    """Rows of a panel whose logits, and three copies of whose anchors, fit in `workspace` bytes."""
    operand = direction.blocks[0].anchors
    itemsize = operand.dtype.itemsize
    columns = sum(block.columns for block in direction.blocks)
    fixed = SUB_PANEL_BYTES * 2 + (0 if all(b.candidates.plain for b in direction.blocks) else 2 * TILE_BYTES)
    each = (columns + 3 * operand.width) * itemsize
    room = max(workspace - fixed, workspace // 2)
    if room < each:
        raise ValueError(
            f"workspace_mib: expected room for one row of {columns} logits ({each / MIB:.1f} MiB), "
            f"got {workspace / MIB:.1f} MiB; raise workspace_mib"
        )
    count = min(rows, room // each)
    return -(-rows // -(-rows // count))  # equal panels


def multiply(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float = 1.0) -> None:
    """out = alpha * a @ b without a second pass for alpha."""
    if alpha == 1.0:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)


def logits_into(out: torch.Tensor, anchors: torch.Tensor, candidates: Operand, scale) -> None:
    """out (r, C) = scale * anchors @ candidates^T."""
    alpha = scale
    if isinstance(scale, torch.Tensor):
        anchors, alpha = anchors * scale, 1.0
    for start, stop in candidates.steps():
        multiply(out[:, start:stop], anchors, candidates.tile(start, stop).T, alpha)


def largest_logit(problem: Problem, direction: Direction) -> float | None:
    """A bound on |logit|, or None where it would need a wait for a GPU."""
    scales = [block.scale for block in direction.blocks]
    if any(isinstance(scale, torch.Tensor) for scale in scales) or (not problem.options.normalize and problem.device.type != "cpu"):
        return None
    largest = 1.0 if problem.options.normalize else problem.largest_product()
    return max(scales) * largest


def sweep(problem: Problem, direction: Direction, hard: HardNegatives | None, gradients: Gradients | None, workspace: int, want_best: bool):
    """Reduce every row of `direction` and add its gradients. Returns (RowResult, RowSums) of all rows, (n,) each."""
    n, dtype, device = problem.query.rows, problem.dtype, problem.device
    blocks, smoothing = direction.blocks, problem.options.label_smoothing
    inverse_temperature = problem.inverse_temperature
    bound = largest_logit(problem, direction)
    fixed = bound is not None and bound <= SAFE_LOGIT
    size = panel_rows(direction, n, workspace)
    sums = RowSums.empty(n, dtype, device, bool(smoothing))
    if hard is not None:
        sums.add(slice(0, n), hard.sums)
    factor = torch.zeros(n, dtype=dtype, device=device)
    logit = direction.positive * inverse_temperature
    buffers = [torch.empty(size * block.columns, dtype=dtype, device=device) for block in blocks]
    dead = [None if b.keep is None or b.keep.is_cuda else (~b.keep).nonzero()[:, 0] for b in blocks]
    total_columns = sum(block.columns for block in blocks)
    step = size if device.type == "cuda" else max(1, SUB_PANEL_BYTES // (total_columns * dtype.itemsize))
    want = gradients is not None
    for start in range(0, n, size):
        stop = min(start + size, n)
        panels = [buffer[: (stop - start) * b.columns].view(stop - start, b.columns) for buffer, b in zip(buffers, blocks)]
        anchors = {}
        for block, panel in zip(blocks, panels):
            if id(block.anchors) not in anchors:
                anchors[id(block.anchors)] = block.anchors.tile(start, stop)
            logits_into(panel, anchors[id(block.anchors)], block.candidates, block.scale)
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            parts = [panel[rows.start - start : rows.stop - start] for panel in panels]
            for block, part, columns in zip(blocks, parts, dead):
                mask_logits(part, block, rows, direction.threshold, direction.active, columns)
            here, shift, dropped = reduce_logits(parts, [b.scale for b in blocks], fixed, bool(smoothing), want_best)
            sums.add(rows, here)
            if want:
                done = finish(_rows(sums, rows), logit[rows], smoothing)
                rescale = torch.where(sums.total[rows] > 0, (shift - sums.shift[rows]).exp() / sums.total[rows], 0)
                factor[rows] = direction.weight[rows] * torch.sigmoid(done.log_sum - logit[rows]) * rescale
                if smoothing:
                    factor[rows] = _smooth(parts, dropped, factor[rows], direction.weight[rows] * done.smooth)
        if want:
            _products(blocks, panels, anchors, start, stop, factor[start:stop] * inverse_temperature, gradients)
    result = finish(sums, logit, smoothing)
    if want:
        _positives(problem, direction, result.positive * direction.weight * inverse_temperature, gradients)
    return result, sums


def _rows(sums: RowSums, rows: slice) -> RowSums:
    def cut(x):
        return None if x is None else x[rows]

    return RowSums(cut(sums.shift), cut(sums.total), cut(sums.best), cut(sums.logits), cut(sums.count))


def _smooth(parts, dropped, factor, smooth):
    """Turn E into derivatives with respect to the logits: factor * E - smooth over the candidates. Factor becomes 1."""
    for part, gone in zip(parts, dropped):
        part.mul_(factor[:, None]).sub_(smooth[:, None]).masked_fill_(gone, 0)
    return torch.ones_like(factor)


def _products(blocks, panels, anchors, start, stop, factor, gradients: Gradients) -> None:
    """dA = diag(factor) (E B) and dB += E^T (diag(factor) A), for every block of one panel."""
    for block, panel in zip(blocks, panels):
        tile = anchors[id(block.anchors)]
        if gradients.wants(block.anchor_sink) or gradients.wants("temperature"):
            rows = None
            for first, last in block.candidates.steps():
                piece = block.candidates.tile(first, last)
                rows = panel[:, first:last] @ piece if rows is None else rows.addmm_(panel[:, first:last], piece)
            rows.mul_(factor[:, None])
            if gradients.wants("temperature"):
                gradients.temperature += (rows * tile).sum()
            if gradients.wants(block.anchor_sink):
                gradients.add_rows(block.anchor_sink, start, stop, rows)
            del rows
        if gradients.wants(block.candidate_sink):
            out = gradients.of(block.candidate_sink)
            out.addmm_(panel.T, tile * factor[:, None])


def _positives(problem: Problem, direction: Direction, coefficient: torch.Tensor, gradients: Gradients) -> None:
    """The positive's own term: q += g t, t += g q, with g (n,) the derivative with respect to its cosine."""
    if gradients.wants("temperature"):
        gradients.temperature += (coefficient * direction.positive).sum()
    positive = problem.target.gathered(problem.positives)
    step = max(1, TILE_BYTES // (problem.query.width * problem.dtype.itemsize))
    for start in range(0, problem.query.rows, step):
        stop = min(start + step, problem.query.rows)
        scale = coefficient[start:stop, None]
        if gradients.wants("query"):
            gradients.add_rows("query", start, stop, positive.tile(start, stop).mul_(scale))
        if gradients.wants("target"):
            gradients.add_rows("positive", start, stop, problem.query.tile(start, stop) * scale)
