"""Panels of exponentials over several blocks of candidates that share one softmax a row.

Two ways to the same result. "exp": one launch a block, fixed shift 1 / temperature - 60, after which rows whose greatest logit
lies outside the safe window are done again with a shift of their own; the second launch is always made and leaves at once where
nothing is unsafe, so nobody waits for the device. In a large panel the rows' sums tell which maxima have to be looked for.
"chunk": cosines from a library product in float32, then two passes.
"""

from dataclasses import dataclass

import torch

from .. import roofline
from . import configs
from .kernels.chunk_panel import chunk_reduce, chunk_write
from .kernels.exp_panel import exp_panel
from .kernels.row_state import Parts, mark, mark_by_sums
from .products import matmul

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
            positive=cut(self.positive, rows),
            ids=tuple((row[rows], col[columns]) for row, col in self.ids),
            threshold=cut(self.threshold, rows),
            keep=cut(self.keep, columns),
            column_offset=self.column_offset + (columns.start or 0),
            row_scale=cut(self.row_scale, rows),
            col_scale=cut(self.col_scale, columns),
        )


def fixed_shift(scale: float | torch.Tensor, rows: int, dtype: torch.dtype, device, active: torch.Tensor | None) -> torch.Tensor:
    """(n,) what is subtracted from every row's logits before their exponentials, +inf for rows that see no block.

    Args: scale: logit per cosine, a number or a 0-d tensor. active: (n,) bool of rows that see the blocks, or None for all.
    """
    if isinstance(scale, torch.Tensor):
        shift = (scale - SHIFT_BELOW_TOP).expand(rows).contiguous()
    else:
        shift = torch.full((rows,), scale - SHIFT_BELOW_TOP, dtype=dtype, device=device)
    return shift if active is None else torch.where(active, shift, float("inf"))


def exponentials(
    blocks: list[BlockView],
    rows: slice,
    outs: list[torch.Tensor | None],
    shift: torch.Tensor,
    exponent: torch.Tensor,
    *,
    want_best: bool,
    bounded: bool,
) -> Parts:
    """Fill outs[b] (R, C_b; None for the sums alone) with exp(logit - shift) of every block and sum the rows.

    Args:
        shift: (n,) from `fixed_shift`. exponent: 0-d, logit per cosine, the same for all blocks.
        bounded: the caller knows that no |logit| exceeds LARGEST_LOGIT: nothing is checked and nothing done again.
    """
    columns = sum(len(block.y) for block in blocks)
    by_sums = roofline.by_sums(rows.stop - rows.start, columns, bounded, want_best)
    need_best, shift = want_best or not (bounded or by_sums), shift[rows]
    row_parts = [
        exp_panel(block.x[rows], block.y, scale=exponent, shift=shift, **_into(out), row_max=need_best, **block.options(rows)).row_part
        for block, out in zip(blocks, outs)
    ]
    parts = Parts(joined(row_parts, 0), shift, joined(row_parts, 1) if need_best else None)
    if not bounded:
        redo(blocks, rows, outs, parts, exponent)
    if not want_best:
        parts.best = None
    return parts


def joined(row_parts: list[torch.Tensor], statistic: int, level: int = 0) -> torch.Tensor:
    """(T, R) one statistic of all blocks' partial sums."""
    parts = [row_part[statistic, level] for row_part in row_parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _into(out) -> dict:
    return dict(out=None if out is None else out[None], store=out is not None)


def redo(blocks, rows, outs, parts: Parts, exponent: torch.Tensor) -> None:
    """Rows whose greatest logit is out of the window get it as their shift; their tiles are written again."""
    tile = configs.exp_panel(configs.architecture(blocks[0].x.device), blocks[0].x.element_size(), True)
    parts.block_r = tile.block_r
    within = None
    if parts.best is None:
        # maxima of tiles whose sums are suspicious, as a rule of none
        within = mark_by_sums(parts.total, parts.shift, tile.block_r)
        again = dict(scale=exponent, shift=parts.shift, redo=within, row_max=True, store=False, tile=tile)
        parts.best = joined([exp_panel(block.x[rows], block.y, **again, **block.options(rows)).row_part for block in blocks], 1)
    parts.redo_shift, parts.redo_tiles = mark(parts.best, parts.shift, exponent, tile.block_r, within)
    # sums of tiles that were not done again are unwritten memory, which nobody reads
    parts.redo_total = joined(
        [
            exp_panel(
                block.x[rows],
                block.y,
                scale=exponent,
                shift=parts.redo_shift,
                **_into(out),
                redo=parts.redo_tiles,
                tile=tile,
                **block.options(rows),
            ).row_part
            for block, out in zip(blocks, outs)
        ],
        0,
    )


def exponentials_at(blocks: list[BlockView], rows: slice, outs: list[torch.Tensor], shift: torch.Tensor, exponent: torch.Tensor) -> None:
    """Fill outs[b] with exp(logit - shift), the rows' sums and so a safe shift (R,) being known; +inf takes a row out."""
    for block, out in zip(blocks, outs):
        exp_panel(block.x[rows], block.y, scale=exponent, shift=shift, out=out[None], **block.options(rows))


def cosines(blocks: list[BlockView], rows: slice, acc: torch.dtype) -> list[torch.Tensor]:
    """Cosines (R, C_b) of every block in float32 (float64), before masks, by the library."""
    return [matmul(block.x[rows], block.y.T, acc) for block in blocks]


def reduce_cosines(blocks, rows: slice, cosine: list[torch.Tensor], exponent: torch.Tensor, *, smoothing: bool) -> list[Parts]:
    """Sums of masked float32 logits, a block's at a time, each row relative to its own maximum."""
    out = []
    for block, cos in zip(blocks, cosine):
        part = chunk_reduce(cos, scale=exponent, smoothing=smoothing, **block.options(rows))
        out.append(Parts(part.total[None], part.shift, part.best[None], logits=part.logits, count=part.count))
    return out


def write_exponentials(blocks, rows: slice, cosine, outs, shift, exponent, *, gain: float = 1.0, smooth=None) -> None:
    """outs[b] = gain (exp(logit - shift) - smooth) from the cosines; arguments as `chunk_write` takes them."""
    for block, cos, out in zip(blocks, cosine, outs):
        chunk_write(cos, scale=exponent, shift=shift, out=out, gain=gain, smooth=smooth, **block.options(rows))
