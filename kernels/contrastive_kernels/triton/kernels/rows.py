"""Passes over (rows, D) matrices, one for all that has to be done to a row before or after its product.

    update    out_i (+)= a_i x_i + b_i y_index(i)                         row factors, and the positive's own term
    scatter   out_j (+)= sum over i with index(i) = j of a_i x_i + b_i y_i    in ascending i: deterministic, no atomics
    dots      x_i . y_index(i)                                            the positives' cosines
    scaled    a_i x_i in the type of x                                    the products' operands
    inverse_norms, project_out                                            normalisation, and its derivative (g - (g . u) u) / |x|

x is a product's result in the accumulator's type, y rows of embeddings as they are stored. Bytes a number of `update`: 4 (x) + 2 (y)
read, 4 written, 4 more read where the result is added to what is there. No FLOP of tensor cores. `update` also returns a_i x_i . z_i
for the temperature's gradient, at 2 bytes more, and takes the projection along where it is the last to write a gradient.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import launch_log as work
from .common import INTERPRET, TRITON_DTYPE, _narrow, cdiv, on_its_device

BLOCK_D = 1024
LONGEST = 0.999  # of 1 / eps: an inverse norm that is not below it belongs to a row shorter than eps


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
    HAS_X: tl.constexpr,
    HAS_Y: tl.constexpr,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(what the row becomes, a x alone) of one piece of it."""
    b_out = tl.zeros((BLOCK_D,), ACC)
    b_x = b_out
    if ADD:
        b_out = tl.load(p_out + i_row * stride_out + o_d, mask=m_d, other=0.0)
    if HAS_X:
        b_x = tl.load(p_x + i_row * stride_x + o_d, mask=m_d, other=0.0).to(ACC) * b_a
        b_out += b_x
    if HAS_Y:
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
    HAS_X: tl.constexpr,
    HAS_A: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_Y_SCALE: tl.constexpr,
    HAS_DOT: tl.constexpr,
    PROJECT: tl.constexpr,
    ADD: tl.constexpr,
    WRITE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_other, b_a, b_b = i_row, 1.0, 1.0
    if HAS_A:
        b_a = tl.load(p_a + i_row)
    if HAS_Y:
        i_other = tl.load(p_index + i_row)
        b_b = tl.load(p_b + i_row)
        if HAS_Y_SCALE:
            b_b *= tl.load(p_y_scale + i_other)
    b_dot = tl.zeros((BLOCK_D,), ACC)
    b_along = tl.zeros((BLOCK_D,), ACC)
    if HAS_DOT or PROJECT:
        for first in range(0, D, BLOCK_D):
            o_d = first + tl.arange(0, BLOCK_D)
            m_d = o_d < D
            b_out, b_x = _updated(
                p_out, p_x, p_y, i_row, i_other, b_a, b_b, o_d, m_d, stride_out, stride_x, stride_y, HAS_X, HAS_Y, ADD, ACC, BLOCK_D
            )
            b_z = tl.load(p_z + i_row * stride_z + o_d, mask=m_d, other=0.0).to(ACC)
            b_dot += b_x * b_z
            b_along += b_out * b_z
    if HAS_DOT:
        tl.store(p_dot + i_row, tl.sum(b_dot, 0))
    if WRITE:
        b_scale, b_share = 1.0, 0.0
        if PROJECT:
            b_scale = tl.load(p_z_scale + i_row)
            b_share = tl.sum(b_along, 0) * b_scale * b_scale
            # a row shorter than eps has no direction, and so no gradient
            b_scale = tl.where(b_scale < longest, b_scale, 0.0)
        # worked out once more instead of read back: what other lanes have written is not theirs to see
        for first in range(0, D, BLOCK_D):
            o_d = first + tl.arange(0, BLOCK_D)
            m_d = o_d < D
            b_out, b_x = _updated(
                p_out, p_x, p_y, i_row, i_other, b_a, b_b, o_d, m_d, stride_out, stride_x, stride_y, HAS_X, HAS_Y, ADD, ACC, BLOCK_D
            )
            if PROJECT:
                b_out = (b_out - b_share * tl.load(p_z + i_row * stride_z + o_d, mask=m_d, other=0.0).to(ACC)) * b_scale
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
    HAS_X: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_Y_SCALE: tl.constexpr,
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
        mine = (i_row % STEP == 0) & (first >= 0) & (first < rows)
        last = tl.where(mine, first + 1, first)
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
        if HAS_X:
            b_out += tl.load(p_x + i_from * stride_x + o_d, mask=m_d, other=0.0).to(ACC) * tl.load(p_a + i_from)
        if HAS_Y:
            b_b = tl.load(p_b + i_from)
            if HAS_Y_SCALE:
                b_b *= tl.load(p_y_scale + i_from)
            b_out += tl.load(p_y + i_from * stride_y + o_d, mask=m_d, other=0.0).to(ACC) * b_b
    tl.store(p_row, b_out, mask=m_d)


@triton.jit
def _dots_kernel(
    p_x, p_y, p_index, p_x_scale, p_y_scale, p_out, D, stride_x, stride_y, HAS_SCALE: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    i_other = tl.load(p_index + i_row)
    b_sum = tl.zeros((BLOCK_D,), ACC)
    for first in range(0, D, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + i_row * stride_x + o_d, mask=o_d < D, other=0.0).to(ACC)
        b_sum += b_x * tl.load(p_y + i_other * stride_y + o_d, mask=o_d < D, other=0.0).to(ACC)
    b_dot = tl.sum(b_sum, 0)
    if HAS_SCALE:
        b_dot = b_dot * tl.load(p_x_scale + i_row) * tl.load(p_y_scale + i_other)
    tl.store(p_out + i_row, b_dot)


@triton.jit
def _scaled_kernel(p_x, p_a, p_b, p_out, D, stride_x, HAS_B: tl.constexpr, UPCAST: tl.constexpr, BLOCK_D: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    b_a = tl.load(p_a + i_row)
    if HAS_B:
        b_a *= tl.load(p_b + i_row)
    for first in range(0, D, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + i_row * stride_x + o_d, mask=o_d < D, other=0.0).to(b_a.dtype)
        tl.store(p_out + i_row * D + o_d, _narrow(b_x * b_a, p_out.dtype.element_ty, UPCAST), mask=o_d < D)


@triton.jit
def _inverse_norms_kernel(p_x, p_keep, p_out, D, stride_x, eps, HAS_KEEP: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros((BLOCK_D,), ACC)
    for first in range(0, D, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + i_row * stride_x + o_d, mask=o_d < D, other=0.0).to(ACC)
        b_sum += b_x * b_x
    # a norm's error is that of every logit of its row: rounded to nearest, where the plain square root and division are approximate
    b_norm = tl.sum(b_sum, 0)
    if ACC == tl.float32:
        b_norm = tl.sqrt_rn(b_norm)
    else:
        b_norm = tl.sqrt(b_norm)
    if HAS_KEEP:
        b_norm = tl.where(tl.load(p_keep + i_row) != 0, b_norm, 1.0)
    b_norm = tl.where(b_norm < eps, eps, b_norm)  # a NaN stays
    if ACC == tl.float32:
        tl.store(p_out + i_row, tl.div_rn(1.0, b_norm))
    else:
        tl.store(p_out + i_row, 1.0 / b_norm)


@triton.jit
def _project_kernel(
    p_grad, p_x, p_scale, p_keep, D, stride_grad, stride_x, longest, HAS_KEEP: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    b_scale = tl.load(p_scale + i_row)
    b_keep = True
    if HAS_KEEP:
        b_keep = tl.load(p_keep + i_row) != 0
    b_along = tl.zeros((BLOCK_D,), ACC)
    for first in range(0, D, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + i_row * stride_x + o_d, mask=(o_d < D) & b_keep, other=0.0).to(ACC)
        b_along += b_x * tl.load(p_grad + i_row * stride_grad + o_d, mask=o_d < D, other=0.0)
    b_share = tl.sum(b_along, 0) * b_scale * b_scale
    b_scale = tl.where(b_scale < longest, b_scale, 0.0)
    for first in range(0, D, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + i_row * stride_x + o_d, mask=(o_d < D) & b_keep, other=0.0).to(ACC)
        p_row = p_grad + i_row * stride_grad + o_d
        tl.store(p_row, (tl.load(p_row, mask=o_d < D, other=0.0) - b_share * b_x) * b_scale, mask=o_d < D)


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


def _block(width: int) -> int:
    return min(BLOCK_D, triton.next_power_of_2(max(width, 1)))


def _tight(x: torch.Tensor | None, instead: torch.Tensor) -> torch.Tensor:
    """A matrix whose width is contiguous; an absent one is given as another, which is never read in its stead."""
    return instead if x is None else x if x.stride(-1) == 1 else x.contiguous()


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
    dots_out = torch.empty(rows, dtype=acc, device=first.device) if dot else None
    matrices = [_tight(m, first) for m in (x, y, z)]

    def pointer(tensor):
        return first if tensor is None else tensor

    if rows:
        _update_kernel[(rows,)](
            first,
            matrices[0],
            pointer(a),
            matrices[1],
            pointer(b),
            pointer(index),
            pointer(y_scale),
            matrices[2],
            pointer(z_scale),
            pointer(dots_out),
            width,
            first.stride(0),
            *(m.stride(0) for m in matrices),
            LONGEST / eps if eps else 0.0,
            HAS_X=x is not None,
            HAS_A=a is not None,
            HAS_Y=y is not None,
            HAS_Y_SCALE=y_scale is not None,
            HAS_DOT=dot,
            PROJECT=z_scale is not None,
            ADD=add,
            WRITE=out is not None,
            ACC=TRITON_DTYPE[acc],
            BLOCK_D=_block(width),
            num_warps=4,
        )
    cells, item = rows * width, first.element_size()
    read = cells * ((item if add else 0) + sum(m.element_size() for m in (x, y, z) if m is not None))
    work.note("rows_update", rows, 0, read, cells * item if out is not None else 0)
    return dots_out


@on_its_device
def scatter(out, segments: Segments, *, x=None, a=None, y=None, b=None, y_scale=None, add: bool) -> None:
    """out_j = (out_j if add) + sum of a_i x_i + b_i s_i y_i over the rows i of segment j.

    out: (m, D), y_scale: (n,); the rest as for `update`.
    """
    places, width = out.shape
    matrices = [_tight(m, out) for m in (x, y)]
    block = _block(width)

    def pointer(tensor):
        return out if tensor is None else tensor

    if places:
        _scatter_kernel[(places, cdiv(width, block))](
            out,
            matrices[0],
            pointer(a),
            matrices[1],
            pointer(b),
            pointer(y_scale),
            pointer(segments.order),
            pointer(segments.first),
            width,
            out.stride(0),
            *(m.stride(0) for m in matrices),
            segments.start,
            segments.rows,
            HAS_X=x is not None,
            HAS_Y=y is not None,
            HAS_Y_SCALE=y_scale is not None,
            ADD=add,
            STEP=segments.step,
            ACC=TRITON_DTYPE[out.dtype],
            BLOCK_D=block,
            num_warps=4,
        )
    rows, item = segments.rows, out.element_size()
    touched = min(rows, places)  # at most: how many places are empty is known to the device alone
    read = width * ((touched * item if add else 0) + rows * sum(m.element_size() for m in (x, y) if m is not None))
    work.note("rows_scatter", places, 0, read, width * item * (touched if add else places))


@on_its_device
def scaled(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """(n, D) a_i b_i x_i, multiplied in the type of a (n,) and rounded once to that of x (n, D); b (n,) or None for 1."""
    x = _tight(x, x)
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        _scaled_kernel[(rows,)](
            x, a, a if b is None else b, out, width, x.stride(0), HAS_B=b is not None, UPCAST=INTERPRET, BLOCK_D=_block(width), num_warps=4
        )
    work.note("row_scaled", rows, 0, work.size(x), work.size(out))
    return out


@on_its_device
def inverse_norms(x: torch.Tensor, acc: torch.dtype, eps: float, keep: torch.Tensor | None = None) -> torch.Tensor:
    """(n,) 1 / max(|x_i|, eps) in `acc`, 1 where not `keep` (n,) bool."""
    x = _tight(x, x)
    rows, width = x.shape
    out = torch.empty(rows, dtype=acc, device=x.device)
    if rows:
        flags = x if keep is None else keep.contiguous().view(torch.uint8)
        _inverse_norms_kernel[(rows,)](
            x, flags, out, width, x.stride(0), eps, HAS_KEEP=keep is not None, ACC=TRITON_DTYPE[acc], BLOCK_D=_block(width), num_warps=4
        )
    work.note("inverse_norms", rows, 0, work.size(x), work.size(out))
    return out


@on_its_device
def project_out(gradient: torch.Tensor, operand, eps: float) -> None:
    """Turn, in place, the gradient (n, D) of an `operands.Operand`'s normalised rows into that of its rows as passed.

    A row shorter than eps has no direction: its gradient is 0, where x / eps would give one of 1 / eps.
    """
    x = _tight(operand.source, operand.source)
    rows, width = gradient.shape
    if rows:
        flags = x if operand.keep is None else operand.keep.contiguous().view(torch.uint8)
        _project_kernel[(rows,)](
            gradient,
            x,
            operand.inverse_norm,
            flags,
            width,
            gradient.stride(0),
            x.stride(0),
            LONGEST / eps,
            HAS_KEEP=operand.keep is not None,
            ACC=TRITON_DTYPE[gradient.dtype],
            BLOCK_D=_block(width),
            num_warps=4,
        )
    work.note("project_out", rows, 0, work.size(x, gradient), work.size(gradient))


@on_its_device
def dots(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, acc: torch.dtype, x_scale=None, y_scale=None) -> torch.Tensor:
    """(n,) x_i . y_index(i) summed in `acc`, times their scales (n,) and (m,), both or neither. x: (n, D), y: (m, D), index: (n,) int64."""
    x, y = _tight(x, x), _tight(y, y)
    rows, width = x.shape
    out = torch.empty(rows, dtype=acc, device=x.device)
    if rows:
        _dots_kernel[(rows,)](
            x,
            y,
            index,
            x if x_scale is None else x_scale,
            x if y_scale is None else y_scale,
            out,
            width,
            x.stride(0),
            y.stride(0),
            HAS_SCALE=x_scale is not None,
            ACC=TRITON_DTYPE[acc],
            BLOCK_D=_block(width),
            num_warps=4,
        )
    work.note("row_dots", rows, 0, rows * width * (x.element_size() + y.element_size()), work.size(out))
    return out


def operand_dots(a, b) -> torch.Tensor:
    """(n,) dot products of matching rows of two `operands.Operand`, the second read through its index."""
    out = dots(a.source, b.source, b.index.contiguous(), a.dtype, a.inverse_norm, b.inverse_norm)
    for keep in (a.keep, None if b.keep is None else b.keep[b.index]):
        out = out if keep is None else torch.where(keep, out, 0.0)  # what is masked may hold anything
    return out
