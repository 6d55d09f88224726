"""Small plain losses: every logit in float32 by the library, one kernel that turns a row of them into its slopes, two products.

    S = X Y^T     G_ij = w / T (p_ij - [j = positive])     dX = G Y     dY = G^T X     loss_i = w log(1 + sum of negatives / positive)

The positive stands in G, so nothing is left to add to the products: eight launches, of which a small loss takes most of its time.
G is rounded to the products' type once; at the positive it holds the negatives' share, where a probability less 1 would cancel.
Bytes an element: 4 written by the product, 4 read from memory and twice more from the cache, 2 written; 6 of scratch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.softmax import RowResult
from . import launch_log
from .kernels.common import _narrow, on_its_device
from .kernels.row_state import _log1p
from .operand_views import stored
from .products import matmul

BLOCK_C = 4096


@triton.jit
def _negatives(p_row, o_c, i_positive, b_scale, C):
    """Logits of a piece of a row, -inf at its positive and beyond its end."""
    b_logit = tl.load(p_row + o_c, mask=o_c < C, other=float("-inf")) * b_scale
    return tl.where(o_c == i_positive, float("-inf"), b_logit)


@triton.jit
def _slopes_kernel(p_cos, p_out, p_loss, p_inverse_temperature, p_positive, p_weight, C, stride, stride_out, BLOCK_C: tl.constexpr):
    ACC: tl.constexpr = p_cos.dtype.element_ty
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_cos + i_row * stride
    i_positive = tl.load(p_positive + i_row)
    b_scale = tl.load(p_inverse_temperature).to(ACC)
    b_positive = tl.load(p_row + i_positive) * b_scale
    b_tops = tl.full((BLOCK_C,), float("-inf"), ACC)
    for first in range(0, C, BLOCK_C):
        b_tops = tl.maximum(b_tops, _negatives(p_row, first + tl.arange(0, BLOCK_C), i_positive, b_scale, C))
    b_top = tl.max(b_tops, 0)
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_sums = tl.zeros((BLOCK_C,), ACC)
    for first in range(0, C, BLOCK_C):
        b_sums += tl.exp(_negatives(p_row, first + tl.arange(0, BLOCK_C), i_positive, b_scale, C) - b_top)
    b_total = tl.sum(b_sums, 0)
    b_none = b_total == 0
    b_x = tl.where(b_none, float("-inf"), b_top + tl.log(tl.where(b_none, 1.0, b_total)) - b_positive)
    b_loss = tl.maximum(b_x, 0.0) + _log1p(tl.exp(-tl.abs(b_x)))
    b_weight = tl.load(p_weight + i_row)
    # a maximum would lose a NaN
    tl.store(p_loss + i_row, tl.where(b_weight != 0, b_weight * tl.where(b_x != b_x, b_x, b_loss), 0.0))
    b_all = tl.where(b_none, 1.0, b_total + tl.exp(b_positive - b_top))
    b_factor = b_weight * b_scale / b_all
    b_slope = -tl.where(b_none, 0.0, b_total / b_all) * b_weight * b_scale
    for first in range(0, C, BLOCK_C):
        o_c = first + tl.arange(0, BLOCK_C)
        b_slopes = tl.exp(_negatives(p_row, o_c, i_positive, b_scale, C) - b_top) * b_factor
        b_slopes = tl.where(o_c == i_positive, b_slope, b_slopes)
        tl.store(p_out + i_row * stride_out + o_c, _narrow(b_slopes, p_out.dtype.element_ty), mask=o_c < C)


def plain(problem, direction, gradients) -> bool:
    """Whether a direction has nothing that this file does not know."""
    return (
        gradients is not None
        and gradients.wanted == {"query", "target"}
        and not problem.options.obstacle("dense")
        and not isinstance(problem.inverse_temperature, torch.Tensor)
        and problem.product_dtype != torch.float16  # whose exponents end above w p / T
    )


@on_its_device
def slopes(cosine: torch.Tensor, inverse_temperature: torch.Tensor, positives: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype):
    """((R, C) derivatives of the loss with respect to the cosines in `dtype`, (R,) losses times weights).

    Args: cosine: (R, C) float32 or float64. inverse_temperature: 0-d. positives: (R,) int64 columns. weight: (R,).
    """
    rows, columns = cosine.shape
    out, loss = torch.empty(rows, columns, dtype=dtype, device=cosine.device), torch.empty(rows, dtype=cosine.dtype, device=cosine.device)
    block = min(BLOCK_C, triton.next_power_of_2(max(columns, 1)))
    if rows:
        _slopes_kernel[(rows,)](
            cosine,
            out,
            loss,
            inverse_temperature,
            positives,
            weight,
            columns,
            cosine.stride(0),
            out.stride(0),
            BLOCK_C=block,
            num_warps=4 if block <= 1024 else 8,
        )
    launch_log.note("dense_slopes", rows, 0, launch_log.size(cosine), launch_log.size(out, loss))
    return out, loss


def sweep(problem, direction, gradients, inverse_temperature: torch.Tensor) -> RowResult:
    """Every row of a `plain` direction; its gradients become those of `gradients`. inverse_temperature: 0-d."""
    query, target = (stored(operand, problem.product_dtype) for operand in (problem.query, problem.target))
    slopes_matrix, weighted = slopes(
        matmul(query, target.T, problem.dtype), inverse_temperature, problem.positives.contiguous(), direction.weight, problem.product_dtype
    )
    gradients.accumulators["query"] = matmul(slopes_matrix, target, problem.dtype)
    gradients.accumulators["target"] = matmul(slopes_matrix.T, query, problem.dtype)
    return RowResult(None, None, None, None, None, weighted)
