"""Row norms and dot products, and what normalisation does to rows and to their gradients: one pass over (rows, D) matrices each.

    dots           x_i . y_index(i)                              the positives' cosines
    scaled         a_i x_i in the type of x                      the products' operands
    inverse_norms  1 / max(|x_i|, eps)
    project_out    g_i -> (g_i - (g_i . u_i) u_i) / |x_i|        derivative of u = x / |x|, in place

Sums are in the accumulator's type. Bytes: each matrix once, `project_out` its two matrices twice and one write.
"""

import torch
import triton
import triton.language as tl

from .. import launch_log
from .common import TRITON_DTYPE, _narrow, on_its_device

BLOCK_D = 1024
LONGEST = 0.999  # of 1 / eps: an inverse norm that is not below it belongs to a row shorter than eps


@triton.jit
def _dots_kernel(p_x, p_y, p_index, p_x_scale, p_y_scale, p_out, D, stride_x, stride_y, ACC: tl.constexpr, BLOCK_D: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    i_other = tl.load(p_index + i_row)
    b_sum = tl.zeros((BLOCK_D,), ACC)
    for first in range(0, D, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + i_row * stride_x + o_d, mask=o_d < D, other=0.0).to(ACC)
        b_sum += b_x * tl.load(p_y + i_other * stride_y + o_d, mask=o_d < D, other=0.0).to(ACC)
    b_dot = tl.sum(b_sum, 0)
    if p_x_scale is not None:
        b_dot = b_dot * tl.load(p_x_scale + i_row) * tl.load(p_y_scale + i_other)
    tl.store(p_out + i_row, b_dot)


@triton.jit
def _scaled_kernel(p_x, p_a, p_b, p_out, D, stride_x, BLOCK_D: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    b_a = tl.load(p_a + i_row)
    if p_b is not None:
        b_a *= tl.load(p_b + i_row)
    for first in range(0, D, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + i_row * stride_x + o_d, mask=o_d < D, other=0.0).to(b_a.dtype)
        tl.store(p_out + i_row * D + o_d, _narrow(b_x * b_a, p_out.dtype.element_ty), mask=o_d < D)


@triton.jit
def _inverse_norms_kernel(p_x, p_keep, p_out, D, stride_x, eps, ACC: tl.constexpr, BLOCK_D: tl.constexpr):
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
    if p_keep is not None:
        b_norm = tl.where(tl.load(p_keep + i_row) != 0, b_norm, 1.0)
    b_norm = tl.where(b_norm < eps, eps, b_norm)  # a NaN stays
    if ACC == tl.float32:
        tl.store(p_out + i_row, tl.div_rn(1.0, b_norm))
    else:
        tl.store(p_out + i_row, 1.0 / b_norm)


@triton.jit
def _project_kernel(p_grad, p_x, p_scale, p_keep, D, stride_grad, stride_x, longest, ACC: tl.constexpr, BLOCK_D: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    b_scale = tl.load(p_scale + i_row)
    b_keep = True
    if p_keep is not None:
        b_keep = tl.load(p_keep + i_row) != 0
    b_along = tl.zeros((BLOCK_D,), ACC)
    for first in range(0, D, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + i_row * stride_x + o_d, mask=(o_d < D) & b_keep, other=0.0).to(ACC)
        b_along += b_x * tl.load(p_grad + i_row * stride_grad + o_d, mask=o_d < D, other=0.0)
    b_along_x = tl.sum(b_along, 0) * b_scale * b_scale
    b_scale = tl.where(b_scale < longest, b_scale, 0.0)
    for first in range(0, D, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + i_row * stride_x + o_d, mask=(o_d < D) & b_keep, other=0.0).to(ACC)
        p_row = p_grad + i_row * stride_grad + o_d
        tl.store(p_row, (tl.load(p_row, mask=o_d < D, other=0.0) - b_along_x * b_x) * b_scale, mask=o_d < D)


def block_width(width: int) -> int:
    return min(BLOCK_D, triton.next_power_of_2(max(width, 1)))


def contiguous_width(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def row_stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _flags(keep: torch.Tensor | None) -> torch.Tensor | None:
    """A bool vector as kernels read it."""
    return None if keep is None else keep.contiguous().view(torch.uint8)


@on_its_device
def scaled(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """(n, D) a_i b_i x_i, multiplied in the type of a (n,) and rounded once to that of x (n, D); b (n,) or None for 1."""
    x = contiguous_width(x)
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        _scaled_kernel[(rows,)](x, a, b, out, width, x.stride(0), BLOCK_D=block_width(width), num_warps=4)
    launch_log.note("row_scaled", rows, 0, launch_log.size(x), launch_log.size(out))
    return out


@on_its_device
def inverse_norms(x: torch.Tensor, acc: torch.dtype, eps: float, keep: torch.Tensor | None = None) -> torch.Tensor:
    """(n,) 1 / max(|x_i|, eps) in `acc`, 1 where not `keep` (n,) bool."""
    x = contiguous_width(x)
    rows, width = x.shape
    out = torch.empty(rows, dtype=acc, device=x.device)
    if rows:
        _inverse_norms_kernel[(rows,)](
            x, _flags(keep), out, width, x.stride(0), eps, ACC=TRITON_DTYPE[acc], BLOCK_D=block_width(width), num_warps=4
        )
    launch_log.note("inverse_norms", rows, 0, launch_log.size(x), launch_log.size(out))
    return out


@on_its_device
def project_out(gradient: torch.Tensor, operand, eps: float) -> None:
    """Turn, in place, the gradient (n, D) of an `operands.Operand`'s normalised rows into that of its rows as passed.

    A row shorter than eps has no direction: its gradient is 0, where x / eps would give one of 1 / eps.
    """
    x = contiguous_width(operand.source)
    rows, width = gradient.shape
    if rows:
        _project_kernel[(rows,)](
            gradient,
            x,
            operand.inverse_norm,
            _flags(operand.keep),
            width,
            gradient.stride(0),
            x.stride(0),
            LONGEST / eps,
            ACC=TRITON_DTYPE[gradient.dtype],
            BLOCK_D=block_width(width),
            num_warps=4,
        )
    launch_log.note("project_out", rows, 0, launch_log.size(x, gradient), launch_log.size(gradient))


@on_its_device
def dots(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor, acc: torch.dtype, x_scale=None, y_scale=None) -> torch.Tensor:
    """(n,) x_i . y_index(i) summed in `acc`, times their scales (n,) and (m,), both or neither. x: (n, D), y: (m, D), index: (n,) int64."""
    x, y = contiguous_width(x), contiguous_width(y)
    rows, width = x.shape
    out = torch.empty(rows, dtype=acc, device=x.device)
    if rows:
        _dots_kernel[(rows,)](
            x,
            y,
            index,
            x_scale,
            y_scale,
            out,
            width,
            x.stride(0),
            y.stride(0),
            ACC=TRITON_DTYPE[acc],
            BLOCK_D=block_width(width),
            num_warps=4,
        )
    launch_log.note("row_dots", rows, 0, rows * width * (x.element_size() + y.element_size()), launch_log.size(out))
    return out


def operand_dots(a, b) -> torch.Tensor:
    """(n,) dot products of matching rows of two `operands.Operand`, the second read through its index."""
    out = dots(a.source, b.source, b.index.contiguous(), a.dtype, a.inverse_norm, b.inverse_norm)
    for keep in (a.keep, None if b.keep is None else b.keep[b.index]):
        out = out if keep is None else torch.where(keep, out, 0.0)  # what is masked may hold anything
    return out
