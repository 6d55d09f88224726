"""The sigmoid loss with the kernels: a logits product whose epilogue makes every pair's loss and derivative, then two products.

    x = scale cos + bias,  z = +1 where the pair belongs together, else -1
    pair = log(1 + exp(-z x))        G = d pair / d x = -z sigmoid(-z x)
    d_query = diag(w scale) (G T),  d_target = G^T (diag(w scale) Q)

Every pair is judged on its own: no sums are waited for, G lies in [-1, 1], so no shift and no second look. FLOPs 6 n M D, bytes 6 an
element in 16-bit types. Partial sums have places of their own and are added in a fixed order: deterministic.
Source: Zhai et al. 2023 (SigLIP); the epilogue is this repository's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.operands import product_dtype
from .. import configs, launch_log
from ..operand_views import OperandView, tight
from ..products import add_scaled_matmul, matmul, row_scaled
from .common import (
    Masks,
    Scales,
    _dot,
    _grouped_tile,
    _narrow,
    _scaled_cosines,
    _slices,
    accumulator,
    cdiv,
    check_dtype,
    dot_precision,
    on_its_device,
    whole_blocks,
)
from .rows import update

PANEL_BYTES = 256 << 20
FLOAT16_GAIN = 2.0**15


@triton.jit
def _log1p(b_e):
    """log(1 + e) for e in [0, 1], to the last digits of a small e."""
    if b_e.dtype == tl.float64:
        # adding 1 cuts digits off e: corrected by what was really added
        b_u = 1.0 + b_e
        return tl.where(b_u == 1.0, b_e, tl.log(b_u) * (b_e / tl.where(b_u == 1.0, 1.0, b_u - 1.0)))
    else:
        # 2 atanh(w), w = e / (2 + e) up to 1/3: the series ends below float32's last digit
        b_w = tl.fdiv(b_e, 2.0 + b_e)
        b_q = b_w * b_w
        b_sum = 1 / 11 + b_q * (1 / 13 + b_q * (1 / 15))
        return 2.0 * b_w * (1.0 + b_q * (1 / 3 + b_q * (1 / 5 + b_q * (1 / 7 + b_q * (1 / 9 + b_q * b_sum)))))


@triton.jit
def _sigmoid_kernel(
    p_x,
    p_y,
    p_g,
    p_scale,
    p_bias,
    scales,
    masks,
    p_part,
    R,
    C,
    D,
    stride_x,
    stride_y,
    column_offset,
    GAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):
    ACC: tl.constexpr = p_part.dtype.element_ty
    tiles_c = tl.cdiv(C, BLOCK_C)
    i_r, i_c = _grouped_tile(tl.program_id(0), tl.cdiv(R, BLOCK_R), tiles_c, GROUP)
    i_r, i_c = i_r.to(tl.int64), i_c.to(tl.int64)
    o_r, o_c, o_k = i_r * BLOCK_R + tl.arange(0, BLOCK_R), i_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    m_r = o_r < R
    p_bx = p_x + tl.where(m_r, o_r, 0)[:, None] * stride_x + o_k[None, :]
    p_by = p_y + tl.where(o_c < C, o_c, 0)[:, None] * stride_y + o_k[None, :]
    b_acc = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for k in range(0, D, BLOCK_K):
        b_acc = _dot(tl.load(p_bx + k), tl.trans(tl.load(p_by + k)), b_acc, PRECISION)
    b_scale, b_bias = tl.load(p_scale).to(ACC), tl.load(p_bias).to(ACC)
    b_loss, b_slope, b_along = tl.zeros((BLOCK_R,), ACC), tl.zeros((BLOCK_R,), ACC), tl.zeros((BLOCK_R,), ACC)
    WIDTH: tl.constexpr = BLOCK_C // SLICES
    b_slices = _slices(b_acc, SLICES)
    for i_slice in tl.static_range(SLICES):
        o_c = i_c * BLOCK_C + i_slice * WIDTH + tl.arange(0, WIDTH)
        m_c = o_c < C
        b_cos = _scaled_cosines(b_slices[i_slice], scales, o_r, o_c, m_r, m_c)
        b_x = b_cos * b_scale + b_bias
        b_sign = tl.full((BLOCK_R, WIDTH), 1.0, ACC)  # -z
        if masks.positive is not None:
            b_positive = tl.load(masks.positive + o_r, mask=m_r, other=-1)
            b_sign = tl.where(b_positive[:, None] == (o_c + column_offset)[None, :], -1.0, b_sign)
        if masks.ids is not None:
            b_row = tl.load(masks.ids[0] + o_r, mask=m_r, other=-0x7FFFFFFFFFFFFFFF)
            b_sign = tl.where(b_row[:, None] == tl.load(masks.ids[1] + o_c, mask=m_c, other=-1)[None, :], -1.0, b_sign)
        b_s = b_x * b_sign
        b_e = tl.exp2(-tl.abs(b_s) * 1.4426950408889634)
        b_pair = tl.maximum(b_s, 0.0) + _log1p(b_e)
        b_g = tl.where(b_s >= 0, b_sign, b_e * b_sign) * (1.0 / (1.0 + b_e))
        m_candidate = m_c
        if masks.keep is not None:
            m_candidate = tl.load(masks.keep + o_c, mask=m_c, other=0) != 0
        b_pair = tl.where(m_candidate[None, :], b_pair, 0.0)
        b_g = tl.where(m_candidate[None, :], b_g, 0.0)
        b_loss += tl.sum(b_pair, 1)
        if p_g is not None:
            b_slope += tl.sum(b_g, 1)
            b_along += tl.sum(b_g * b_cos, 1)
            if GAIN != 1.0:
                b_g = b_g * GAIN
            tl.store(p_g + o_r[:, None] * C + o_c[None, :], _narrow(b_g, p_g.dtype.element_ty), mask=m_r[:, None] & m_c[None, :])
    # partial results lie as (what, column tile, row)
    p_out = p_part + i_c * R + o_r
    tl.store(p_out, b_loss, mask=m_r)
    if p_g is not None:
        tl.store(p_out + tiles_c.to(tl.int64) * R, b_slope, mask=m_r)
        tl.store(p_out + 2 * tiles_c.to(tl.int64) * R, b_along, mask=m_r)


@on_its_device
def sigmoid_panel(
    x, y, *, scale, bias, row_scale=None, col_scale=None, positive=None, ids=None, keep=None, column_offset=0, out=None, gain=1.0, tile=None
):
    """(3, R) sums over the columns of every pair's loss, derivative, and derivative times cosine; the last two only with `out`.

    Args:
        x, y: (R, D), (C, D), one dtype. scale, bias: 0-d tensors. row_scale, col_scale: (R,), (C,) inverse norms, both or neither.
        positive: (R,) int64 columns, counted from column_offset, that belong to the rows; -1 for none.
        ids: ((R,), (C,)) int64; pairs of equal ids belong together, a row that has none brings a number that no column bears.
        keep: (C,) bool. out: (R, C) contiguous, for the derivatives times `gain`, in the operands' dtype; None where only the loss is
            wanted. All vectors are contiguous.
    """
    check_dtype("sigmoid_panel", x.dtype)
    rows, columns, acc, device = len(x), len(y), accumulator(x.dtype), x.device
    tile = tile or configs.sigmoid_panel(configs.architecture(device), x.element_size())
    tiles_r, tiles_c = cdiv(rows, tile.block_r), cdiv(columns, tile.block_c)
    x, y = whole_blocks(x, tile.block_k), whole_blocks(y, tile.block_k)
    part = torch.empty(1 if out is None else 3, tiles_c, rows, dtype=acc, device=device)
    if rows and columns:
        _sigmoid_kernel[(tiles_r * tiles_c,)](
            x,
            y,
            out,
            scale.to(acc),
            bias.to(acc),
            Scales.of(row_scale, col_scale),
            Masks.of(positive, () if ids is None else (ids,), keep=keep),
            part,
            rows,
            columns,
            x.shape[1],
            x.stride(0),
            y.stride(0),
            column_offset,
            GAIN=gain,
            PRECISION=dot_precision(x.dtype),
            GROUP=tile.group,
            SLICES=tile.slices,
            **tile.constants,
            **tile.options,
        )
    flops = 2 * tiles_r * tile.block_r * tiles_c * tile.block_c * x.shape[1]
    launch_log.note("sigmoid_panel", tiles_r * tiles_c, flops, launch_log.size(x, y), launch_log.size(out, part))
    return part.sum(1)


def add_columns(pairs, target, target_ids, offset: int, sums, d_target) -> None:
    """What `contrastive_kernels.eager.sigmoid.add_columns` does in plain torch."""
    dtype = product_dtype(pairs.query.source, target.source)
    query, columns, acc = OperandView(pairs.query, dtype), OperandView(target, dtype), pairs.query.dtype
    positives, query_ids, target_ids, keep = (tight(v) for v in (pairs.positives, pairs.ids, target_ids, target.keep))
    # G is at most 1: float16 gets 15 bits more below it, and the factors lose them again
    gain = FLOAT16_GAIN if dtype == torch.float16 else 1.0
    size = max(1, PANEL_BYTES // max(1, target.rows * dtype.itemsize))
    for start in range(0, pairs.query.rows, size):
        rows = slice(start, min(start + size, pairs.query.rows))
        x, weight = query.raw[rows], pairs.weight[rows]
        out = torch.empty(len(x), target.rows, dtype=dtype, device=x.device) if sums.differentiate else None
        row_sums = sigmoid_panel(
            x,
            columns.raw,
            scale=pairs.scale,
            bias=pairs.bias,
            row_scale=None if query.scale is None else query.scale[rows],
            col_scale=columns.scale,
            positive=None if positives is None else positives[rows],
            ids=None if query_ids is None else (query_ids[rows], target_ids),
            keep=keep,
            column_offset=offset,
            out=out,
            gain=gain,
        )
        sums.loss[rows] += row_sums[0]
        if out is None:
            continue
        sums.d_bias += (row_sums[1] * weight).sum()
        sums.d_scale += (row_sums[2] * weight).sum()
        factor = weight * pairs.scale / gain
        if sums.d_query is not None:
            update(sums.d_query[rows], x=matmul(out, columns.unit, acc), a=factor, add=True)
        if d_target is not None:
            scaled, rest = row_scaled(x, factor if query.scale is None else factor * query.scale[rows])
            add_scaled_matmul(d_target, out.T, scaled, rest)
