"""Softmax over a panel of cosines that a library product left in float32: for float16, unnormalised input, and label smoothing.

    pass 1   per row: running maximum m, sum exp(k cos - m), greatest cosine, sum and number of kept logits
    pass 2   G_ij = gain (exp(k cos_ij - shift_i) - smooth_i) over the kept candidates, 0 elsewhere, in the products' type

With smooth = 0 G is E of `exp_panel`; with label smoothing shift_i = lse_i and smooth_i = smoothing / candidates, the derivative
with respect to the logit. Bytes an element: 4 written by the product, 4 read twice, 2 written here: 14; no exponent is ever out of
range, since the shift is the row's own maximum. A row is reduced by one program, in order: deterministic.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import configs, launch_log
from .common import Masks, Scales, _drop, _narrow, _scaled_cosines, cdiv, check_columns, on_its_device, scalar


@triton.jit
def _masked_cosines(p_cos, scales, masks, o_r, o_c, m_r, m_c, stride, column_offset):
    b_cos = tl.load(p_cos + o_r[:, None] * stride + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0)
    b_cos = _scaled_cosines(b_cos, scales, o_r, o_c, m_r, m_c)
    return _drop(b_cos, masks, o_r, o_c, m_r, m_c, o_r, o_c + column_offset, False, False)


@triton.jit
def _chunk_reduce_kernel(
    p_cos,
    p_exponent,
    scales,
    masks,
    p_shift,
    p_total,
    p_best,
    p_sum,
    p_count,
    R,
    C,
    stride,
    column_offset,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = p_cos.dtype.element_ty
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    b_k = tl.load(p_exponent).to(ACC) * 1.4426950408889634
    b_best = tl.full((BLOCK_R,), -1e30, ACC)
    b_total = tl.zeros((BLOCK_R,), ACC)
    b_sum = tl.zeros((BLOCK_R,), ACC)
    b_count = tl.zeros((BLOCK_R,), ACC)
    for first in range(0, C, BLOCK_C):
        o_c = first + tl.arange(0, BLOCK_C).to(tl.int64)
        m_c = o_c < C
        b_cos = _masked_cosines(p_cos, scales, masks, o_r, o_c, m_r, m_c, stride, column_offset)
        b_new = tl.maximum(b_best, tl.max(b_cos, 1))
        # exp2((-1e30 - -1e30) k) would be 1 in a row that has no candidate yet: such elements are excluded by value
        b_dropped = b_cos <= -1e29  # a NaN is not
        b_e = tl.where(b_dropped, 0.0, tl.exp2((b_cos - b_new[:, None]) * b_k))
        b_total = b_total * tl.exp2((b_best - b_new) * b_k) + tl.sum(b_e, 1)
        b_best = b_new
        if p_count is not None:
            b_sum += tl.sum(tl.where(b_dropped, 0.0, b_cos), 1)
            b_count += tl.sum(1 - b_dropped.to(ACC), 1)
    tl.store(p_total + o_r, b_total, mask=m_r)
    b_any = b_best > -1e29
    tl.store(p_best + o_r, tl.where(b_any, b_best, float("-inf")), mask=m_r)
    tl.store(p_shift + o_r, tl.where(b_any, b_best * tl.load(p_exponent).to(ACC), float("-inf")), mask=m_r)
    if p_count is not None:
        tl.store(p_sum + o_r, b_sum * tl.load(p_exponent).to(ACC), mask=m_r)
        tl.store(p_count + o_r, b_count, mask=m_r)


@triton.jit
def _chunk_write_kernel(
    p_cos,
    p_out,
    p_exponent,
    p_shift,
    p_smooth,
    scales,
    masks,
    R,
    C,
    stride,
    stride_out,
    column_offset,
    GAIN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = p_cos.dtype.element_ty
    tiles_c = tl.cdiv(C, BLOCK_C)
    i_r, i_c = (tl.program_id(0) // tiles_c).to(tl.int64), (tl.program_id(0) % tiles_c).to(tl.int64)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_r, m_c = o_r < R, o_c < C
    b_cos = _masked_cosines(p_cos, scales, masks, o_r, o_c, m_r, m_c, stride, column_offset)
    b_k = tl.load(p_exponent).to(ACC) * 1.4426950408889634
    b_shift = tl.load(p_shift + o_r, mask=m_r, other=float("inf")) * 1.4426950408889634
    b_e = tl.exp2(b_cos * b_k - b_shift[:, None])
    if p_smooth is not None:
        b_smooth = tl.load(p_smooth + o_r, mask=m_r, other=0.0)
        b_e -= tl.where(b_shift < float("inf"), b_smooth, 0.0)[:, None]  # nothing for a row that takes no part
    b_e = tl.where(b_cos <= -1e29, 0.0, b_e * GAIN)
    p_bout = p_out + o_r[:, None] * stride_out + o_c[None, :]
    tl.store(p_bout, _narrow(b_e, p_out.dtype.element_ty), mask=m_r[:, None] & m_c[None, :])


@dataclass
class RowReduction:
    """(R,) each: shift (the greatest logit), sum of exp(logit - shift), greatest cosine; -inf, 0, -inf without a candidate.

    With smoothing also the sum and the number of the kept logits, else None.
    """

    shift: torch.Tensor
    total: torch.Tensor
    best: torch.Tensor
    logits: torch.Tensor | None
    count: torch.Tensor | None


@on_its_device
def chunk_reduce(
    cos,
    *,
    scale,
    smoothing=False,
    row_scale=None,
    col_scale=None,
    positive=None,
    ids=(),
    threshold=None,
    keep=None,
    column_offset=0,
    tile=None,
) -> RowReduction:
    """First pass over cosines (R, C) float32 (or float64): per row what the loss needs. Arguments as for `exp_panel`."""
    rows, columns = cos.shape
    check_columns("chunk_reduce", column_offset + columns)
    sums = [torch.empty(rows, dtype=cos.dtype, device=cos.device) for _ in range(5 if smoothing else 3)]
    shift, total, best, logits, count = sums if smoothing else (*sums, None, None)
    tile = tile or configs.CHUNK_REDUCE
    grid = cdiv(rows, tile.block_r)
    if rows:
        _chunk_reduce_kernel[(grid,)](
            cos,
            scalar(scale, cos.dtype, cos.device),
            Scales.of(row_scale, col_scale),
            Masks.of(positive, ids, threshold, keep),
            shift,
            total,
            best,
            logits,
            count,
            rows,
            columns,
            cos.stride(0),
            column_offset,
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            **tile.options,
        )
    launch_log.note("chunk_reduce", grid, 0, launch_log.size(cos), launch_log.size(*sums))
    return RowReduction(shift, total, best, logits, count)


@on_its_device
def chunk_write(
    cos,
    *,
    scale,
    shift,
    out,
    gain=1.0,
    smooth=None,
    row_scale=None,
    col_scale=None,
    positive=None,
    ids=(),
    threshold=None,
    keep=None,
    column_offset=0,
    tile=None,
) -> None:
    """Second pass: out (R, C) = gain (exp(scale cos - shift) - smooth) over the kept candidates, 0 elsewhere.

    shift: (R,); a row with +inf comes out as zeros. smooth: (R,) or None for 0. gain: a number.
    """
    rows, columns = cos.shape
    tile = tile or configs.CHUNK_WRITE
    grid = cdiv(rows, tile.block_r) * cdiv(columns, tile.block_c)
    if rows and columns:
        _chunk_write_kernel[(grid,)](
            cos,
            out,
            scalar(scale, cos.dtype, cos.device),
            shift,
            smooth,
            Scales.of(row_scale, col_scale),
            Masks.of(positive, ids, threshold, keep),
            rows,
            columns,
            cos.stride(0),
            out.stride(0),
            column_offset,
            GAIN=float(gain),
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            **tile.options,
        )
    launch_log.note("chunk_write", grid, 0, launch_log.size(cos), launch_log.size(out))
