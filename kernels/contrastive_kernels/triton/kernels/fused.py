"""Small D: loss and gradients without any panel in memory, the whole width of a tile on the chip.

    forward    per row: best cosine, sum of exp(logit - best's), and A_i = sum_j exp(logit_ij - best's) y_j     (online softmax)
    backward   dY_j = sum_i f_i exp(logit_ij - shift_i) x_i, logits computed again

The forward is attention with the candidates as both keys and values, so that the anchors' gradient, diag(f) A, comes with the sums:
4 R C D FLOP, and 4 R C D again for the candidates. That is 8 instead of 6 R C D, but no exponential is ever written: bytes are the
operands (re-read from L2) and the results. Long loops are cut into splits whose partial results lie apart and are added in a fixed
order: deterministic. The factor of a row is applied in float32 before the one rounding of exp(...) to the operands' type.
Source: the recurrence of Milakov and Gimelshein (2018), Rabe and Staats (2021); which gradient rides on it is this repository's.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import configs, launch_log
from .common import (
    Masks,
    Scales,
    _dot,
    _drop,
    _narrow,
    accumulator,
    cdiv,
    check_columns,
    check_dtype,
    dot_precision,
    on_its_device,
    scalar,
    whole_blocks,
)

# Above it the accumulators of a tile leave no registers for the epilogue, and the panels are faster anyway.
MAXIMUM_WIDTH = 128
# float16 keeps exponentials down to 2^-24 of the greatest; this gain gives them ten bits more.
GAIN = {torch.float16: 1024.0}


@triton.jit
def _fused_fwd_kernel(
    p_x,
    p_y,
    p_exponent,
    scales,
    masks,
    p_shift,
    p_total,
    p_best,
    p_out,
    R,
    C,
    stride_x,
    stride_y,
    per_split,
    column_offset,
    gain,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    ACC: tl.constexpr = p_total.dtype.element_ty
    i_r, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    o_d = tl.arange(0, BLOCK_D)
    b_x = tl.load(p_x + tl.where(m_r, o_r, 0)[:, None] * stride_x + o_d[None, :])
    b_k = tl.load(p_exponent).to(ACC) * 1.4426950408889634
    b_best = tl.full((BLOCK_R,), -1e30, ACC)
    b_total = tl.zeros((BLOCK_R,), ACC)
    b_out = tl.zeros((BLOCK_R, BLOCK_D if p_out is not None else 16), ACC)
    first = i_split * per_split
    for start in range(first, tl.minimum(first + per_split, C), BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        m_c = o_c < C
        # columns past the end read column 0; _drop takes them out
        b_y = tl.load(p_y + tl.where(m_c, o_c, 0)[:, None] * stride_y + o_d[None, :])
        b_cos = _dot(b_x, tl.trans(b_y), tl.zeros((BLOCK_R, BLOCK_C), ACC), PRECISION)
        if scales is not None:
            b_col_scale = tl.load(scales.col + o_c, mask=m_c, other=0.0)
            b_cos = b_cos * tl.load(scales.row + o_r, mask=m_r, other=0.0)[:, None] * b_col_scale[None, :]
        b_cos = _drop(b_cos, masks, o_r, o_c, m_r, m_c, o_r, o_c + column_offset, EVEN_C, False)
        b_new = tl.maximum(b_best, tl.max(b_cos, 1))
        # nothing kept so far: relative to 0, where -1e30 gives 0 and not exp(0)
        b_base = tl.where(b_new > -1e29, b_new, 0.0) * b_k
        b_rescale = tl.exp2(b_best * b_k - b_base)
        b_e = tl.exp2(b_cos * b_k - b_base[:, None])
        b_total = b_total * b_rescale + tl.sum(b_e, 1)
        b_best = b_new
        if p_out is not None:
            if scales is not None:
                b_e = b_e * b_col_scale[None, :]
            b_out = _dot(_narrow(b_e * gain, b_x.dtype), b_y, b_out * b_rescale[:, None], PRECISION)
    o_part = i_split * R + o_r
    b_any = b_best > -1e29
    tl.store(p_best + o_part, tl.where(b_any, b_best, float("-inf")), mask=m_r)
    tl.store(p_shift + o_part, tl.where(b_any, b_best * tl.load(p_exponent).to(ACC), float("-inf")), mask=m_r)
    tl.store(p_total + o_part, b_total, mask=m_r)
    if p_out is not None:
        tl.store(p_out + o_part[:, None] * BLOCK_D + o_d[None, :], b_out / gain, mask=m_r[:, None])


@triton.jit
def _fused_bwd_kernel(
    p_x,
    p_y,
    p_exponent,
    p_shift,
    p_factor,
    scales,
    masks,
    p_out,
    R,
    C,
    stride_x,
    stride_y,
    per_split,
    column_offset,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    ACC: tl.constexpr = p_out.dtype.element_ty
    # tiles stand on their side, (columns, rows): the product that follows takes them as they lie in registers
    i_c, i_split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_d = tl.arange(0, BLOCK_D)
    b_y = tl.load(p_y + tl.where(m_c, o_c, 0)[:, None] * stride_y + o_d[None, :])
    b_k = tl.load(p_exponent).to(ACC) * 1.4426950408889634
    b_out = tl.zeros((BLOCK_C, BLOCK_D), ACC)
    first = i_split * per_split
    for start in range(first, tl.minimum(first + per_split, R), BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R).to(tl.int64)
        m_r = o_r < R
        b_x = tl.load(p_x + tl.where(m_r, o_r, 0)[:, None] * stride_x + o_d[None, :])
        b_cos = _dot(b_y, tl.trans(b_x), tl.zeros((BLOCK_C, BLOCK_R), ACC), PRECISION)
        # a row that takes no part, or is past the end, has shift +inf and factor 0
        b_shift = tl.load(p_shift + o_r, mask=m_r, other=float("inf")).to(ACC) * 1.4426950408889634
        b_factor = tl.load(p_factor + o_r, mask=m_r, other=0.0).to(ACC)
        if scales is not None:
            b_row_scale = tl.load(scales.row + o_r, mask=m_r, other=0.0)
            b_cos = b_cos * tl.load(scales.col + o_c, mask=m_c, other=0.0)[:, None] * b_row_scale[None, :]
            b_factor = b_factor * b_row_scale
        b_cos = _drop(b_cos, masks, o_r, o_c, m_r, m_c, o_r, o_c + column_offset, EVEN_C, True)
        b_e = tl.exp2(b_cos * b_k - b_shift[None, :]) * b_factor[None, :]
        b_out = _dot(_narrow(b_e, b_x.dtype), b_x, b_out, PRECISION)
    tl.store(p_out + (i_split * C + o_c)[:, None] * BLOCK_D + o_d[None, :], b_out, mask=m_c[:, None])


@dataclass
class FusedSums:
    """(R,) each, accumulator type: shift (greatest logit), sum of exp(logit - shift), greatest cosine; -inf, 0, -inf without one.

    weighted: (R, D), sum_j exp(logit_ij - shift_i) y_j with unit y where norms were given; None unless asked for.
    """

    shift: torch.Tensor
    total: torch.Tensor
    best: torch.Tensor
    weighted: torch.Tensor | None


def block_width(width: int) -> int:
    """The power of two that holds the width, 32 at least so that a tile of rows is 16 bytes for every thread; rows are padded to it."""
    return max(32, triton.next_power_of_2(width))


def _prepare(x, y, row_scale, col_scale, positive, ids, threshold, keep, column_offset):
    check_dtype("fused", x.dtype)
    check_columns("fused", column_offset + len(y))
    if x.shape[1] > MAXIMUM_WIDTH:
        raise ValueError(f"fused: expected D of at most {MAXIMUM_WIDTH}, got {x.shape[1]}; take the panels")
    if row_scale is not None and x.dtype == torch.float16:
        raise ValueError(
            "fused: expected bfloat16 or float32 rows beside inverse norms, got float16, which cannot hold exponentials; normalise first"
        )
    block_d = block_width(x.shape[1])
    scales, masks = Scales.of(row_scale, col_scale), Masks.of(positive, ids, threshold, keep)
    return whole_blocks(x, block_d), whole_blocks(y, block_d), block_d, scales, masks


def _cut(steps: int, programs: int, device, splits) -> tuple[int, int]:
    """(splits, steps of each): a few programs for every multiprocessor, and no more partial results than that needs."""
    splits = min(steps, splits or configs.fused_splits(device, programs))
    per_split = cdiv(steps, splits)
    return cdiv(steps, per_split), per_split


@on_its_device
def fused_forward(
    x,
    y,
    *,
    scale,
    weighted=True,
    row_scale=None,
    col_scale=None,
    positive=None,
    ids=(),
    threshold=None,
    keep=None,
    column_offset=0,
    tile=None,
    splits=None,
) -> FusedSums:
    """Row sums of x (R, D) against y (C, D), D at most 128, and with `weighted` the exponentials' product with y.

    Masks as for `exp_panel`. splits: pieces that the columns are cut into, instead of what the device suggests.
    Raises: ValueError for a dtype or width that the kernel does not take.
    """
    rows, columns, width, device, acc = len(x), len(y), x.shape[1], x.device, accumulator(x.dtype)
    x, y, block_d, scales, masks = _prepare(x, y, row_scale, col_scale, positive, ids, threshold, keep, column_offset)
    tile = tile or configs.fused(
        configs.architecture(device), block_d, "forward", configs.is_masked(columns, ids, threshold, keep, row_scale)
    )
    tiles_r, tiles_c = cdiv(rows, tile.block_r), cdiv(columns, tile.block_c)
    splits, per_split = _cut(tiles_c, tiles_r, device, splits) if columns else (1, 0)
    shift, total, best = (torch.empty(splits, rows, dtype=acc, device=device) for _ in range(3))
    out = torch.empty(splits, rows, block_d, dtype=acc, device=device) if weighted else None
    if rows:
        _fused_fwd_kernel[(tiles_r, splits)](
            x,
            y,
            scalar(scale, acc, device),
            scales,
            masks,
            shift,
            total,
            best,
            out,
            rows,
            columns,
            x.stride(0),
            y.stride(0),
            per_split * tile.block_c,
            column_offset,
            GAIN.get(x.dtype, 1.0),
            EVEN_C=columns % tile.block_c == 0,
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            PRECISION=dot_precision(x.dtype),
            BLOCK_D=block_d,
            **tile.options,
        )
    flops = (4 if weighted else 2) * tiles_r * tile.block_r * tiles_c * tile.block_c * block_d
    launch_log.note("fused_forward", tiles_r * splits, flops, launch_log.size(x, y), launch_log.size(shift, total, best, out))
    if splits == 1:
        return FusedSums(shift[0], total[0], best[0], out[0][:, :width] if weighted else None)
    top = shift.amax(0)
    part = (shift - torch.where(top == float("-inf"), 0.0, top)).exp()
    merged = (out * part[:, :, None]).sum(0)[:, :width] if weighted else None
    return FusedSums(top, (total * part).sum(0), best.amax(0), merged)


@on_its_device
def fused_backward(
    x,
    y,
    *,
    scale,
    shift,
    factor,
    row_scale=None,
    col_scale=None,
    positive=None,
    ids=(),
    threshold=None,
    keep=None,
    column_offset=0,
    tile=None,
    splits=None,
) -> torch.Tensor:
    """(C, D) accumulator type: sum_i factor_i exp(logit_ij - shift_i) x_i, with unit x where norms are given.

    shift: (R,), at least the row's greatest logit, +inf for a row without part. factor: (R,). The rest as for `fused_forward`.
    """
    rows, columns, width, device, acc = len(x), len(y), x.shape[1], x.device, accumulator(x.dtype)
    x, y, block_d, scales, masks = _prepare(x, y, row_scale, col_scale, positive, ids, threshold, keep, column_offset)
    tile = tile or configs.fused(
        configs.architecture(device), block_d, "backward", configs.is_masked(columns, ids, threshold, keep, row_scale)
    )
    tiles_r, tiles_c = cdiv(rows, tile.block_r), cdiv(columns, tile.block_c)
    splits, per_split = _cut(tiles_r, tiles_c, device, splits) if rows else (1, 0)
    out = torch.empty(splits, columns, block_d, dtype=acc, device=device)
    rest = None
    if x.dtype in GAIN:
        # float16 has no exponents for factors such as 1e-9: the greatest becomes GAIN, and comes back afterwards
        top = factor.abs().amax()
        rest = torch.where(top > 0, top, 1.0) / GAIN[x.dtype]
        factor = factor / rest
    if columns:
        _fused_bwd_kernel[(tiles_c, splits)](
            x,
            y,
            scalar(scale, acc, device),
            shift.to(acc),
            factor.to(acc),
            scales,
            masks,
            out,
            rows,
            columns,
            x.stride(0),
            y.stride(0),
            per_split * tile.block_r,
            column_offset,
            EVEN_C=columns % tile.block_c == 0,
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            PRECISION=dot_precision(x.dtype),
            BLOCK_D=block_d,
            **tile.options,
        )
    launch_log.note(
        "fused_backward",
        tiles_c * splits,
        4 * tiles_r * tile.block_r * tiles_c * tile.block_c * block_d,
        launch_log.size(x, y, shift, factor),
        launch_log.size(out),
    )
    out = (out[0] if splits == 1 else out.sum(0))[:, :width]
    return out if rest is None else out * rest
