"""Panels of exponentials over several blocks of candidates that share one softmax a row.

Two ways to the same result. "exp": one launch a block, fixed shift 1 / temperature - 60, after which rows whose greatest logit
lies outside the safe window are done again with a shift of their own; the second launch is always made and leaves at once where
nothing is unsafe, so nobody waits for the device. "chunk": cosines from a library product in float32, then two passes.
"""

from dataclasses import dataclass

import torch

from contrastive_kernels.triton import configs
from contrastive_kernels.triton.chunk_panel import chunk_reduce, chunk_write
from contrastive_kernels.triton.common import accumulator, cdiv, scalar
from contrastive_kernels.triton.exp_panel import exp_panel
from contrastive_kernels.triton.products import matmul

# A row's greatest logit less the shift: e^65 * 2^25 columns is inside float32, e^-40 leaves 47 nats below the greatest.
SAFE_ABOVE, SAFE_BELOW = 65.0, -40.0
SHIFT_BELOW_TOP = 60.0
# Where no |logit| can be greater, exponents lie between 60 - 2 * 73 and 60 whatever the row: float32's and bfloat16's normal numbers.
LARGEST_LOGIT = 73.0
ROUNDING = 1.01  # norms and products are rounded
# Where the shift is a row's own maximum, exponentials are at most 1; float16 gets this much more so that 2^-34 is still there.
FLOAT16_GAIN = 1024.0


@dataclass
class BlockView:
    """One block of candidates as the kernels take it.

    Args:
        x: (n, D) anchors, y: (C, D) candidates, in the type of the products. scale: logit per cosine, float or 0-d tensor.
        row_scale, col_scale: (n,), (C,) factors of the cosines or None, both or neither.
        positive: (n,) int64 column left out, counted from column_offset. ids: pairs ((n,), (C,)). keep: (C,) bool or None.
        threshold: (n,) cosines above which a candidate is dropped, or None.
    """

    x: torch.Tensor
    y: torch.Tensor
    scale: float | torch.Tensor
    positive: torch.Tensor | None = None
    ids: tuple = ()
    threshold: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    column_offset: int = 0
    row_scale: torch.Tensor | None = None
    col_scale: torch.Tensor | None = None

    def options(self, rows: slice = slice(None), columns: slice = slice(None)) -> dict:
        """The masks of some rows and columns, as the kernels' keyword arguments."""

        def cut(x, part):
            return None if x is None else x[part]

        return dict(
            positive=cut(self.positive, rows), ids=tuple((row[rows], col[columns]) for row, col in self.ids),
            threshold=cut(self.threshold, rows), keep=cut(self.keep, columns), column_offset=self.column_offset + (columns.start or 0),
            row_scale=cut(self.row_scale, rows), col_scale=cut(self.col_scale, columns),
        )


@dataclass
class PanelSums:
    """(R,) each: logits are shift + log(total) when summed; best is the greatest cosine, or None when it was not needed."""

    shift: torch.Tensor
    total: torch.Tensor
    best: torch.Tensor | None
    logits: torch.Tensor | None = None
    count: torch.Tensor | None = None


def exponentials(blocks: list[BlockView], rows: slice, outs: list[torch.Tensor | None], active, *, want_best: bool, bounded: bool) -> PanelSums:
    """Fill outs[b] (R, C_b; None for the sums alone) with exp(logit - shift) of every block and sum the rows.

    Args:
        active: (n,) bool of rows that see these blocks, or None for all.
        bounded: the caller knows that no |logit| exceeds LARGEST_LOGIT: nothing is checked and nothing done again.
    """
    first = blocks[0]
    acc, device = accumulator(first.x.dtype), first.x.device
    count = rows.stop - rows.start
    top = None
    for block in blocks:
        scale = scalar(block.scale, acc, device)
        top = scale if top is None else torch.maximum(top, scale)
    inactive = None if active is None else ~active[rows]
    shift = (top - SHIFT_BELOW_TOP).expand(count).contiguous()
    if inactive is not None:
        shift = torch.where(inactive, float("inf"), shift)
    need_max = want_best or not bounded
    total, best, tops = 0.0, None, None
    for block, out in zip(blocks, outs):
        panel = exp_panel(block.x[rows], block.y, scale=block.scale, shift=shift, **_into(out), row_max=need_max, **block.options(rows))
        total = total + panel.row_sum[0]
        if need_max:
            here = panel.row_max[0]
            best = here if best is None else torch.maximum(best, here)
            logit = here * scalar(block.scale, acc, device)
            tops = logit if tops is None else torch.maximum(tops, logit)
    if not bounded:
        shift, total = redo(blocks, rows, outs, shift, total, tops)
    if inactive is not None:
        shift = torch.where(inactive, 0.0, shift)
        best = best if best is None else torch.where(inactive, float("-inf"), best)
    return PanelSums(shift, total, best)


def _into(out) -> dict:
    return dict(out=None if out is None else out[None], store=out is not None)


def redo(blocks, rows, outs, shift, total, tops):
    """Rows whose greatest logit is out of the window get it as their shift; their tiles are written again."""
    above = tops - shift
    unsafe = ((above > SAFE_ABOVE) | (above < SAFE_BELOW)) & (tops > float("-inf")) & (shift < float("inf"))
    own = torch.where(unsafe, tops, shift)
    again = 0.0
    for block, out in zip(blocks, outs):
        tile = configs.exp_panel(configs.architecture(block.x.device), block.x.element_size(), True)
        tiles = cdiv(len(unsafe), tile.block_r)
        padded = torch.nn.functional.pad(unsafe, (0, tiles * tile.block_r - len(unsafe)))
        marked = padded.view(tiles, tile.block_r).any(1).to(torch.int32)
        panel = exp_panel(block.x[rows], block.y, scale=block.scale, shift=own, **_into(out), redo=marked, tile=tile, **block.options(rows))
        # sums of tiles that were not done again are unwritten memory: only unsafe rows are read
        again = again + panel.row_sum[0]
    return own, torch.where(unsafe, again, total)


def exponentials_at(blocks: list[BlockView], rows: slice, outs: list[torch.Tensor], shift: torch.Tensor) -> None:
    """Fill outs[b] with exp(logit - shift), the rows' sums and so a safe shift (R,) being known; +inf takes a row out."""
    for block, out in zip(blocks, outs):
        exp_panel(block.x[rows], block.y, scale=block.scale, shift=shift, out=out[None], **block.options(rows))


def cosines(blocks: list[BlockView], rows: slice, acc: torch.dtype) -> list[torch.Tensor]:
    """Cosines (R, C_b) of every block in float32 (float64), before masks, by the library."""
    return [matmul(block.x[rows], block.y.T, acc) for block in blocks]


def reduce_cosines(blocks, rows: slice, cosine: list[torch.Tensor], active, *, smoothing: bool) -> PanelSums:
    """Row sums of masked float32 logits, each row relative to its own maximum."""
    merged = None
    for block, cos in zip(blocks, cosine):
        part = chunk_reduce(cos, scale=block.scale, smoothing=smoothing, **block.options(rows))
        here = PanelSums(part.shift, part.total, part.best, part.logits, part.count)
        merged = here if merged is None else _merge(merged, here)
    if active is not None:
        gone = ~active[rows]
        for name, value in (("shift", float("-inf")), ("total", 0.0), ("best", float("-inf")), ("logits", 0.0), ("count", 0.0)):
            held = getattr(merged, name)
            if held is not None:
                setattr(merged, name, torch.where(gone, value, held))
    return merged


def _merge(a: PanelSums, b: PanelSums) -> PanelSums:
    shift = torch.maximum(a.shift, b.shift)
    safe = torch.where(shift == float("-inf"), 0.0, shift)
    total = a.total * (a.shift - safe).exp() + b.total * (b.shift - safe).exp()
    logits = None if a.logits is None else a.logits + b.logits
    count = None if a.count is None else a.count + b.count
    return PanelSums(shift, total, torch.maximum(a.best, b.best), logits, count)


def write_exponentials(blocks, rows: slice, cosine, outs, shift, *, a=None, b=None) -> None:
    """outs[b] = a exp(logit - shift) - b from the cosines; arguments (R,) as `chunk_write` takes them."""
    for block, cos, out in zip(blocks, cosine, outs):
        chunk_write(cos, scale=block.scale, shift=shift, out=out, a=a, b=b, **block.options(rows))
