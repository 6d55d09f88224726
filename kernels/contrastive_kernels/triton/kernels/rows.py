"""Passes over (rows, D) matrices, one for all that has to be done to a row before or after its product.

    update    out_i (+)= a_i x_i + b_i y_index(i)                         row factors, and the positive's own term
    scatter   out_j (+)= sum over i with index(i) = j of a_i x_i + b_i y_i    in ascending i: deterministic, no atomics

x is a product's result in the accumulator's type, y rows of embeddings as they are stored. Bytes a number of `update`: 4 (x) + 2 (y)
read, 4 written, 4 more read where the result is added to what is there. No FLOP of tensor cores. `update` also returns a_i x_i . z_i
for the temperature's gradient, at 2 bytes more, and takes the projection along where it is the last to write a gradient.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import launch_log
from .common import TRITON_DTYPE, cdiv, on_its_device
from .norms import LONGEST, block_width, contiguous_width, row_stride


@triton.jit
def _updated(
    p_out,
    p_x,
    p_y,
    i_row,
    i_other,
    b_a,
    b_b,
    o_d,
    m_d,
    stride_out,
    stride_x,
    stride_y,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(what the row becomes, a x alone) of one piece of it."""
    b_out = tl.zeros((BLOCK_D,), ACC)
    b_x = b_out
    if ADD:
        b_out = tl.load(p_out + i_row * stride_out + o_d, mask=m_d, other=0.0)
    if p_x is not None:
        b_x = tl.load(p_x + i_row * stride_x + o_d, mask=m_d, other=0.0).to(ACC) * b_a
        b_out += b_x
    if p_y is not None:
        b_out += tl.load(p_y + i_other * stride_y + o_d, mask=m_d, other=0.0).to(ACC) * b_b
    return b_out, b_x


@triton.jit
def _update_kernel(
    p_out,
    p_x,
    p_a,
    p_y,
    p_b,
    p_index,
    p_y_scale,
    p_z,
    p_z_scale,
    p_dot,
    D,
    stride_out,
    stride_x,
    stride_y,
    stride_z,
    longest,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_other, b_a, b_b = i_row, 1.0, 1.0
    if p_a is not None:
        b_a = tl.load(p_a + i_row)
    if p_y is not None:
        i_other = tl.load(p_index + i_row)
        b_b = tl.load(p_b + i_row)
        if p_y_scale is not None:
            b_b *= tl.load(p_y_scale + i_other)
    b_dot = tl.zeros((BLOCK_D,), ACC)
    b_along = tl.zeros((BLOCK_D,), ACC)
    if p_dot is not None or p_z_scale is not None:
        for first in range(0, D, BLOCK_D):
            o_d = first + tl.arange(0, BLOCK_D)
            m_d = o_d < D
            b_out, b_x = _updated(p_out, p_x, p_y, i_row, i_other, b_a, b_b, o_d, m_d, stride_out, stride_x, stride_y, ADD, ACC, BLOCK_D)
            b_z = tl.load(p_z + i_row * stride_z + o_d, mask=m_d, other=0.0).to(ACC)
            b_dot += b_x * b_z
            b_along += b_out * b_z
    if p_dot is not None:
        tl.store(p_dot + i_row, tl.sum(b_dot, 0))
    if p_out is not None:
        b_scale, b_along_z = 1.0, 0.0
        if p_z_scale is not None:
            b_scale = tl.load(p_z_scale + i_row)
            b_along_z = tl.sum(b_along, 0) * b_scale * b_scale
            # a row shorter than eps has no direction, and so no gradient
            b_scale = tl.where(b_scale < longest, b_scale, 0.0)
        # worked out once more instead of read back: what other lanes have written is not theirs to see
        for first in range(0, D, BLOCK_D):
            o_d = first + tl.arange(0, BLOCK_D)
            m_d = o_d < D
            b_out, b_x = _updated(p_out, p_x, p_y, i_row, i_other, b_a, b_b, o_d, m_d, stride_out, stride_x, stride_y, ADD, ACC, BLOCK_D)
            if p_z_scale is not None:
                b_out = (b_out - b_along_z * tl.load(p_z + i_row * stride_z + o_d, mask=m_d, other=0.0).to(ACC)) * b_scale
            tl.store(p_out + i_row * stride_out + o_d, b_out, mask=m_d)


@triton.jit
def _scatter_kernel(
    p_out,
    p_x,
    p_a,
    p_y,
    p_b,
    p_y_scale,
    p_order,
    p_first,
    D,
    stride_out,
    stride_x,
    stride_y,
    start,
    rows,
    ADD: tl.constexpr,
    STEP: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    if STEP:
        # places 0, STEP, 2 STEP ... hold rows 0, 1, 2 ..., of which [start, start + rows) are here
        first = i_row // STEP - start
        m_present = (i_row % STEP == 0) & (first >= 0) & (first < rows)
        last = tl.where(m_present, first + 1, first)
    else:
        first, last = tl.load(p_first + i_row), tl.load(p_first + i_row + 1)
    if ADD:
        if first == last:
            return
    p_row = p_out + i_row * stride_out + o_d
    b_out = tl.zeros((BLOCK_D,), ACC)
    if ADD:
        b_out = tl.load(p_row, mask=m_d, other=0.0)
    for k in range(first, last):
        i_from = k if STEP else tl.load(p_order + k)
        if p_x is not None:
            b_out += tl.load(p_x + i_from * stride_x + o_d, mask=m_d, other=0.0).to(ACC) * tl.load(p_a + i_from)
        if p_y is not None:
            b_b = tl.load(p_b + i_from)
            if p_y_scale is not None:
                b_b *= tl.load(p_y_scale + i_from)
            b_out += tl.load(p_y + i_from * stride_y + o_d, mask=m_d, other=0.0).to(ACC) * b_b
    tl.store(p_row, b_out, mask=m_d)


@dataclass
class Segments:
    """Which rows go to which place.

    Args:
        rows: how many there are. step, start: place i * step takes row i, of which [start, start + rows) are here;
            nothing has to be sorted.
        order, first: without a step, (n,) rows sorted by place, and where each place begins among them, (places + 1,).
    """

    rows: int
    step: int = 0
    start: int = 0
    order: torch.Tensor | None = None
    first: torch.Tensor | None = None

    @classmethod
    def make(cls, index: torch.Tensor, places: int) -> "Segments":
        """From the place of every row; on the device, without waiting for it."""
        values, order = index.sort(stable=True)
        return cls(len(index), order=order, first=torch.searchsorted(values, torch.arange(places + 1, device=index.device)))


@on_its_device
def update(
    out, *, x=None, a=None, y=None, b=None, index=None, y_scale=None, z=None, dot=False, z_scale=None, eps: float = 0.0, add: bool
) -> torch.Tensor | None:
    """out_i = (out_i if add) + a_i x_i + b_i s_index(i) y_index(i), in place; with `dot` also returns (n,) a_i x_i . z_i.

    Args:
        out: (n, D) float32 or float64, or None where only the dots are wanted; may be x itself.
        x: (n, D), a: (n,) of its type, or None for 1.
        y: (m, D) of any floating type with b (n,) and index (n,) int64; y_scale: (m,) factors s of its rows, or None for 1. z: (n, D).
        z_scale: (n,) inverse norms of z, or None: then out is turned into the gradient of the rows z that were normalised; 0 for a row
            shorter than eps.
    """
    rows, width = (x if out is None else out).shape
    first = x if out is None else out
    acc = first.dtype
    dot_products = torch.empty(rows, dtype=acc, device=first.device) if dot else None
    matrices = [contiguous_width(m) for m in (x, y, z)]
    if rows:
        _update_kernel[(rows,)](
            out,
            matrices[0],
            a,
            matrices[1],
            b,
            index,
            y_scale,
            matrices[2],
            z_scale,
            dot_products,
            width,
            row_stride(out),
            *map(row_stride, matrices),
            LONGEST / eps if eps else 0.0,
            ADD=add,
            ACC=TRITON_DTYPE[acc],
            BLOCK_D=block_width(width),
            num_warps=4,
        )
    cells, item = rows * width, first.element_size()
    read = cells * ((item if add else 0) + sum(m.element_size() for m in (x, y, z) if m is not None))
    launch_log.note("rows_update", rows, 0, read, cells * item if out is not None else 0)
    return dot_products


@on_its_device
def scatter(out, segments: Segments, *, x=None, a=None, y=None, b=None, y_scale=None, add: bool) -> None:
    """out_j = (out_j if add) + sum of a_i x_i + b_i s_i y_i over the rows i of segment j.

    out: (m, D), y_scale: (n,); the rest as for `update`.
    """
    places, width = out.shape
    matrices = [contiguous_width(m) for m in (x, y)]
    block = block_width(width)
    if places:
        _scatter_kernel[(places, cdiv(width, block))](
            out,
            matrices[0],
            a,
            matrices[1],
            b,
            y_scale,
            segments.order,
            segments.first,
            width,
            out.stride(0),
            *map(row_stride, matrices),
            segments.start,
            segments.rows,
            ADD=add,
            STEP=segments.step,
            ACC=TRITON_DTYPE[out.dtype],
            BLOCK_D=block,
            num_warps=4,
        )
    rows, item = segments.rows, out.element_size()
    touched = min(rows, places)  # at most: how many places are empty is known to the device alone
    read = width * ((touched * item if add else 0) + rows * sum(m.element_size() for m in (x, y) if m is not None))
    launch_log.note("rows_scatter", places, 0, read, width * item * (touched if add else places))
