"""Passes over (rows, D) gradients, one for all that has to be done to a row after its product.

    update    out_i (+)= a_i x_i + b_i y_index(i)                         row factors, and the positive's own term
    scatter   out_j (+)= sum over i with index(i) = j of a_i x_i + b_i y_i    in ascending i: deterministic, no atomics
    dots      x_i . y_index(i)                                            the positives' cosines

x is a product's result in the accumulator's type, y rows of embeddings as they are stored. Bytes a number: 4 (x) + 2 (y) read,
4 written, 4 more read where the result is added to what is there. No FLOP of tensor cores. `update` also returns a_i x_i . z_i for the
temperature's gradient, at 2 bytes more.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from contrastive_kernels.triton import work
from contrastive_kernels.triton.common import TRITON_DTYPE, cdiv, on_its_device

BLOCK_D = 1024


@triton.jit
def _update_kernel(
    p_out, p_x, p_a, p_y, p_b, p_index, p_z, p_dot, D, stride_out, stride_x, stride_y, stride_z,
    HAS_X: tl.constexpr, HAS_A: tl.constexpr, HAS_Y: tl.constexpr, HAS_DOT: tl.constexpr, ADD: tl.constexpr, WRITE: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    b_dot = tl.zeros((BLOCK_D,), ACC)
    for first in range(0, D, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_out = tl.zeros((BLOCK_D,), ACC)
        if ADD:
            b_out = tl.load(p_out + i_row * stride_out + o_d, mask=m_d, other=0.0)
        if HAS_X:
            b_x = tl.load(p_x + i_row * stride_x + o_d, mask=m_d, other=0.0).to(ACC)
            if HAS_A:
                b_x = b_x * tl.load(p_a + i_row)
            b_out += b_x
            if HAS_DOT:
                b_dot += b_x * tl.load(p_z + i_row * stride_z + o_d, mask=m_d, other=0.0).to(ACC)
        if HAS_Y:
            b_y = tl.load(p_y + tl.load(p_index + i_row) * stride_y + o_d, mask=m_d, other=0.0).to(ACC)
            b_out += b_y * tl.load(p_b + i_row)
        if WRITE:
            tl.store(p_out + i_row * stride_out + o_d, b_out, mask=m_d)
    if HAS_DOT:
        tl.store(p_dot + i_row, tl.sum(b_dot, 0))


@triton.jit
def _scatter_kernel(
    p_out, p_x, p_a, p_y, p_b, p_order, p_first, D, stride_out, stride_x, stride_y,
    HAS_X: tl.constexpr, HAS_Y: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    first, last = tl.load(p_first + i_row), tl.load(p_first + i_row + 1)
    if ADD:
        if first == last:
            return
    p_row = p_out + i_row * stride_out + o_d
    b_out = tl.zeros((BLOCK_D,), ACC)
    if ADD:
        b_out = tl.load(p_row, mask=m_d, other=0.0)
    for k in range(first, last):
        i_from = tl.load(p_order + k)
        if HAS_X:
            b_out += tl.load(p_x + i_from * stride_x + o_d, mask=m_d, other=0.0).to(ACC) * tl.load(p_a + i_from)
        if HAS_Y:
            b_out += tl.load(p_y + i_from * stride_y + o_d, mask=m_d, other=0.0).to(ACC) * tl.load(p_b + i_from)
    tl.store(p_row, b_out, mask=m_d)


@triton.jit
def _dots_kernel(p_x, p_y, p_index, p_out, D, stride_x, stride_y, ACC: tl.constexpr, BLOCK_D: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    i_other = tl.load(p_index + i_row)
    b_sum = tl.zeros((BLOCK_D,), ACC)
    for first in range(0, D, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + i_row * stride_x + o_d, mask=o_d < D, other=0.0).to(ACC)
        b_sum += b_x * tl.load(p_y + i_other * stride_y + o_d, mask=o_d < D, other=0.0).to(ACC)
    tl.store(p_out + i_row, tl.sum(b_sum, 0))


@dataclass
class Segments:
    """Rows sorted by where they go: `order` (n,), and where each of the places begins in it, (places + 1,)."""

    order: torch.Tensor
    first: torch.Tensor

    @classmethod
    def make(cls, index: torch.Tensor, places: int) -> "Segments":
        """From the place of every row; on the device, without waiting for it."""
        values, order = index.sort(stable=True)
        return cls(order, torch.searchsorted(values, torch.arange(places + 1, device=index.device)))


def _block(width: int) -> int:
    return min(BLOCK_D, triton.next_power_of_2(max(width, 1)))


def _tight(x: torch.Tensor | None, instead: torch.Tensor) -> torch.Tensor:
    """A matrix whose width is contiguous; an absent one is given as another, which is never read in its stead."""
    return instead if x is None else x if x.stride(-1) == 1 else x.contiguous()


@on_its_device
def update(out, *, x=None, a=None, y=None, b=None, index=None, z=None, add: bool) -> torch.Tensor | None:
    """out_i = (out_i if add) + a_i x_i + b_i y_index(i), in place; with z also returns (n,) a_i x_i . z_i.

    Args:
        out: (n, D) float32 or float64, or None where only the dots are wanted; may be x itself. x: (n, D), a: (n,) of its type, or None for 1.
        y: (m, D) of any floating type with b (n,) and index (n,) int64. z: (n, D).
    """
    rows, width = (x if out is None else out).shape
    first = x if out is None else out
    acc = first.dtype
    dot = None if z is None else torch.empty(rows, dtype=acc, device=first.device)
    matrices = [_tight(m, first) for m in (x, y, z)]
    if rows:
        _update_kernel[(rows,)](
            first, matrices[0], first if a is None else a, matrices[1], first if b is None else b, first if index is None else index,
            matrices[2], first if dot is None else dot, width, first.stride(0), *(m.stride(0) for m in matrices),
            HAS_X=x is not None, HAS_A=a is not None, HAS_Y=y is not None, HAS_DOT=z is not None, ADD=add, WRITE=out is not None, ACC=TRITON_DTYPE[acc],
            BLOCK_D=_block(width), num_warps=4,
        )
    cells, item = rows * width, first.element_size()
    read = cells * ((item if add else 0) + sum(m.element_size() for m in (x, y, z) if m is not None))
    work.note("rows_update", rows, 0, read, cells * item if out is not None else 0)
    return dot


@on_its_device
def scatter(out, segments: Segments, *, x=None, a=None, y=None, b=None, add: bool) -> None:
    """out_j = (out_j if add) + sum of a_i x_i + b_i y_i over the rows i of segment j. out: (m, D); the rest as for `update`."""
    places, width = out.shape
    matrices = [_tight(m, out) for m in (x, y)]
    block = _block(width)
    if places:
        _scatter_kernel[(places, cdiv(width, block))](
            out, matrices[0], out if a is None else a, matrices[1], out if b is None else b, segments.order, segments.first,
            width, out.stride(0), *(m.stride(0) for m in matrices),
            HAS_X=x is not None, HAS_Y=y is not None, ADD=add, ACC=TRITON_DTYPE[out.dtype], BLOCK_D=block, num_warps=4,
        )
    rows, item = len(segments.order), out.element_size()
    touched = min(rows, places)  # at most: how many places are empty is known to the device alone
    read = width * ((touched * item if add else 0) + rows * sum(m.element_size() for m in (x, y) if m is not None))
    work.note("rows_scatter", places, 0, read, width * item * (touched if add else places))


@on_its_device
def dots(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    """(n,) x_i . y_index(i) summed in `acc`, of rows as they are stored. x: (n, D), y: (m, D), index: (n,) int64."""
    x, y = _tight(x, x), _tight(y, y)
    rows, width = x.shape
    out = torch.empty(rows, dtype=acc, device=x.device)
    if rows:
        _dots_kernel[(rows,)](x, y, index, out, width, x.stride(0), y.stride(0), ACC=TRITON_DTYPE[acc], BLOCK_D=_block(width), num_warps=4)
    work.note("row_dots", rows, 0, rows * width * (x.element_size() + y.element_size()), work.size(out))
    return out


def operand_dots(a, b) -> torch.Tensor:
    """(n,) dot products of matching rows of two `operands.Operand`, the second read through its index."""
    out = dots(a.source, b.source, b.index, a.dtype)
    if a.inverse_norm is not None:
        out = out * a.inverse_norm * b.inverse_norm[b.index]
    for keep in (a.keep, None if b.keep is None else b.keep[b.index]):
        out = out if keep is None else torch.where(keep, out, 0.0)  # what is masked may hold anything
    return out
