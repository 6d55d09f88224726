"""One sweep over panels of rows, in plain torch: value and gradients in 6 N M D FLOP, never N x M.

A panel of R rows sees every candidate of its rows, so its softmax is complete when its products are formed:

    S = scale * A B^T   ->  E = exp(S - shift), sums  ->  dA = diag(a) (E B),  dB += E^T (diag(a) A),  a = w (1 - p_pos) / sum(E) / T

with a the row's factor folded into the smaller operand, so that E is written once and read twice (12 bytes an element in
float32). Rows are reduced in sub-panels that stay near the cache. Scratch is O(R (sum of columns) + R D), within the
workspace; GEMMs write into it with out=.
"""

from __future__ import annotations

import torch

from contrastive_kernels.gradients import Gradients
from contrastive_kernels.hard import HardNegatives
from contrastive_kernels.operands import TILE_BYTES, Operand
from contrastive_kernels.problem import Direction, Problem
from contrastive_kernels.softmax import SAFE_LOGIT, RowSums, finish, mask_logits, reduce_logits, row_factor

SUB_PANEL_BYTES = 4 << 20
MIB = 1 << 20


def panel_rows(rows: int, columns: int, width: int, itemsize: int, fixed: int, workspace: int) -> int:
    """Rows of a panel whose logits, and three copies of whose anchors, fit in `workspace` bytes beside `fixed` bytes."""
    each = (columns + 3 * width) * itemsize
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


def logits_are_safe(problem: Problem, direction: Direction) -> bool:
    """True when no logit can exceed SAFE_LOGIT; False too where knowing it would need a wait for a GPU."""
    if any(isinstance(block.scale, torch.Tensor) for block in direction.blocks) or problem.options.group is not None:
        return False
    scale = max(block.scale for block in direction.blocks)
    if scale > SAFE_LOGIT or problem.options.normalize:
        return scale <= SAFE_LOGIT * 0.999
    return problem.device.type == "cpu" and scale * problem.largest_product() <= SAFE_LOGIT


class Panels:
    """Buffers for the logits of one direction, and the walk over them."""

    def __init__(self, problem: Problem, direction: Direction, workspace: int):
        self.problem, self.direction, self.blocks = problem, direction, direction.blocks
        dtype, device = problem.dtype, problem.device
        columns = sum(block.width for block in self.blocks)
        tiles = 0 if all(b.columns.operand.plain for b in self.blocks) else 2 * TILE_BYTES
        self.rows = problem.query.rows
        self.size = panel_rows(self.rows, columns, problem.query.width, dtype.itemsize, tiles + 2 * SUB_PANEL_BYTES, workspace)
        self.buffers = [torch.empty(self.size * block.width, dtype=dtype, device=device) for block in self.blocks]
        keeps = [block.columns.keep for block in self.blocks]
        self.dead = [None if k is None or k.is_cuda else (~k).nonzero()[:, 0] for k in keeps]
        self.step = self.size if device.type == "cuda" else max(1, SUB_PANEL_BYTES // (columns * dtype.itemsize))
        self.scales = [block.scale for block in self.blocks]
        self.smoothing = problem.options.label_smoothing

    def __iter__(self):
        """(start, stop) of each panel."""
        return ((a, min(a + self.size, self.rows)) for a in range(0, self.rows, self.size))

    def fill(self, start: int, stop: int):
        """Compute the logits of rows [start, stop): a panel a block, and the anchors' tiles by identity."""
        panels, anchors = [], {}
        for block, buffer in zip(self.blocks, self.buffers):
            panel = buffer[: (stop - start) * block.width].view(stop - start, block.width)
            if id(block.anchors) not in anchors:
                anchors[id(block.anchors)] = block.anchors.tile(start, stop)
            logits_into(panel, anchors[id(block.anchors)], block.columns.operand, block.scale)
            panels.append(panel)
        return panels, anchors

    def parts(self, panels, start: int, stop: int):
        """Sub-panels with their negatives masked: (slice of rows, one view a block)."""
        direction = self.direction
        for first in range(start, stop, self.step):
            rows = slice(first, min(first + self.step, stop))
            parts = [panel[rows.start - start : rows.stop - start] for panel in panels]
            for block, part, dead in zip(self.blocks, parts, self.dead):
                mask_logits(part, block, rows, direction.threshold, direction.active, dead)
            yield rows, parts

    def products(self, panels, anchors, start, stop, factor, gradients: Gradients) -> None:
        """dA = diag(factor) (E B) and dB += E^T (diag(factor) A), for every block of one panel."""
        for block, panel in zip(self.blocks, panels):
            tile, candidates = anchors[id(block.anchors)], block.columns.operand
            if gradients.wants(block.anchor_sink) or gradients.wants("temperature"):
                rows = None
                for first, last in candidates.steps():
                    piece = candidates.tile(first, last)
                    rows = panel[:, first:last] @ piece if rows is None else rows.addmm_(panel[:, first:last], piece)
                rows.mul_(factor[:, None])
                if gradients.wants("temperature"):
                    gradients.temperature += torch.linalg.vecdot(rows, tile).sum()
                if gradients.wants(block.anchor_sink):
                    gradients.add_anchors(block.anchor_sink, start, stop, rows)
                del rows
            if gradients.wants(block.columns.sink):
                gradients.of(block.columns.sink, candidates.rows).addmm_(panel.T, tile * factor[:, None])


def smooth_parts(parts, dropped, factor, smooth) -> None:
    """E becomes the derivative with respect to the logits: factor * E - smooth, over the candidates."""
    for part, gone in zip(parts, dropped):
        part.mul_(factor[:, None]).sub_(smooth[:, None]).masked_fill_(gone, 0)


def sweep(problem: Problem, direction: Direction, hard: HardNegatives | None, gradients: Gradients | None, workspace: int, want_best: bool):
    """Reduce every row of `direction` and add its gradients. Returns (RowResult, RowSums) of all rows, (n,) each."""
    n, smoothing = problem.query.rows, problem.options.label_smoothing
    safe = logits_are_safe(problem, direction)
    panels = Panels(problem, direction, workspace)
    sums = RowSums.empty(n, problem.dtype, problem.device, bool(smoothing))
    if hard is not None:
        sums.add(slice(0, n), hard.sums)
    factor = torch.ones(n, dtype=problem.dtype, device=problem.device)
    logit = direction.positive * problem.inverse_temperature
    for start, stop in panels:
        filled, anchors = panels.fill(start, stop)
        for rows, parts in panels.parts(filled, start, stop):
            here, shift, dropped = reduce_logits(parts, panels.scales, safe, bool(smoothing), want_best)
            sums.add(rows, here)
            if gradients is None:
                continue
            own = sums.rows(rows)
            part_factor = row_factor(own, logit[rows], shift) * direction.weight[rows]
            if smoothing:
                smooth_parts(parts, dropped, part_factor, direction.weight[rows] * finish(own, logit[rows], smoothing).smooth)
            else:
                factor[rows] = part_factor
        if gradients is not None:
            panels.products(filled, anchors, start, stop, factor[start:stop] * problem.inverse_temperature, gradients)
    result = finish(sums, logit, smoothing)
    if gradients is not None:
        gradients.add_positives(direction, result.positive * direction.weight * problem.inverse_temperature)
    return result, sums
