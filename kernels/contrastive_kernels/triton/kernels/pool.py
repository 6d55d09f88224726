"""Last-token rows of hidden states, gathered and L2-normalised in one pass, and the gradient of that.

    y_b = h_b / max(|h_b|, eps),  h_b = hidden[index_b]          dh_b = (g_b - (g_b . y_b) y_b) / |h_b|,  0 where |h_b| < eps

`index` (B,) numbers rows of the flattened hidden states and is made on the device, from an attention mask padded on either side by
one launch that reads the mask once and keeps nothing of its size: no host sync, and no (B, L, D) buffer. Bytes: B D read, B D written
(backward 2 B D read); the rest of the hidden states is never touched. A sequence without a token has index -1 and gives zeros.
"""

import torch
import triton
import triton.language as tl

from .. import launch_log
from .common import TRITON_DTYPE, _narrow, accumulator, check_dtype, on_its_device

BLOCK_D = 1024
BLOCK_L = 1024


@triton.jit
def _last_token_kernel(p_mask, p_index, L, stride_b, stride_l, BLOCK_L: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    b_last = tl.full((BLOCK_L,), -1, tl.int64)
    for first in range(0, L, BLOCK_L):
        o_l = first + tl.arange(0, BLOCK_L).to(tl.int64)
        b_mask = tl.load(p_mask + i_b * stride_b + o_l * stride_l, mask=o_l < L, other=0)
        b_last = tl.where(b_mask != 0, o_l, b_last)
    b_top = tl.max(b_last, 0)
    tl.store(p_index + i_b, tl.where(b_top < 0, -1, i_b * L + b_top))


@triton.jit
def _pool_fwd_kernel(
    p_hidden, p_index, p_out, p_inverse, D, stride_h, eps, NORMALIZE: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr
):
    i_b = tl.program_id(0).to(tl.int64)
    i_row = tl.load(p_index + i_b)
    p_row = p_hidden + tl.maximum(i_row, 0) * stride_h
    width = tl.where(i_row >= 0, D, 0)  # a sequence without a token reads nothing
    b_square = tl.zeros((BLOCK_D,), ACC)
    for first in range(0, D, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_h = tl.load(p_row + o_d, mask=o_d < width, other=0.0).to(ACC)
        b_square += b_h * b_h
    b_norm = tl.sqrt(tl.sum(b_square, 0))
    # a row shorter than eps has no direction: the stored factor 0 says so to the backward
    tl.store(p_inverse + i_b, tl.where(b_norm < eps, 0.0, 1.0 / tl.maximum(b_norm, eps)))
    b_factor = 1.0 / tl.maximum(b_norm, eps) if NORMALIZE else 1.0
    for first in range(0, D, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_h = tl.load(p_row + o_d, mask=o_d < width, other=0.0).to(ACC)
        tl.store(p_out + i_b * D + o_d, _narrow(b_h * b_factor, p_out.dtype.element_ty), mask=o_d < D)


@triton.jit
def _pool_bwd_kernel(
    p_grad, p_hidden, p_index, p_inverse, p_out, D, stride_g, stride_h, NORMALIZE: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr
):
    i_b = tl.program_id(0).to(tl.int64)
    i_row = tl.load(p_index + i_b)
    p_row = p_hidden + tl.maximum(i_row, 0) * stride_h
    width = tl.where(i_row >= 0, D, 0)  # a sequence without a token reads nothing
    b_inverse = tl.load(p_inverse + i_b).to(ACC)
    b_along = tl.zeros((BLOCK_D,), ACC)
    if NORMALIZE:
        for first in range(0, D, BLOCK_D):
            o_d = first + tl.arange(0, BLOCK_D)
            b_h = tl.load(p_row + o_d, mask=o_d < width, other=0.0).to(ACC)
            b_along += tl.load(p_grad + i_b * stride_g + o_d, mask=o_d < width, other=0.0).to(ACC) * b_h
    b_dot = tl.sum(b_along, 0) * b_inverse * b_inverse
    for first in range(0, D, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_g = tl.load(p_grad + i_b * stride_g + o_d, mask=o_d < width, other=0.0).to(ACC)
        if NORMALIZE:
            b_h = tl.load(p_row + o_d, mask=o_d < width, other=0.0).to(ACC)
            b_g = (b_g - b_dot * b_h) * b_inverse
        tl.store(p_out + i_b * D + o_d, _narrow(b_g, p_out.dtype.element_ty), mask=o_d < D)


@on_its_device
def last_token_index(attention_mask) -> torch.Tensor:
    """(B,) int64 rows of the flattened hidden states that hold each sequence's last token; -1 for a sequence without one.

    attention_mask: (B, L) of any type, non-zero where a token is; padding on either side.
    """
    rows, length = attention_mask.shape
    mask = attention_mask.view(torch.uint8) if attention_mask.dtype == torch.bool else attention_mask
    index = torch.empty(rows, dtype=torch.int64, device=mask.device)
    if rows:
        _last_token_kernel[(rows,)](mask, index, length, mask.stride(0), mask.stride(1), BLOCK_L=BLOCK_L)
    return index


def _flat(hidden: torch.Tensor) -> torch.Tensor:
    """(B, L, D) as (B * L, D) without a copy where strides allow it."""
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    return hidden.reshape(-1, hidden.shape[-1])


def _block(width: int) -> int:
    return min(BLOCK_D, triton.next_power_of_2(max(width, 1)))


@on_its_device
def pool_forward(hidden, index, *, normalize=True, eps=1e-12) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (B, D) of `hidden` (B, L, D) or (T, D) at `index` (B,), normalised if asked, and their inverse norms (B,).

    The norm is summed in float32 (float64 for float64). The inverse norm is 0 for a row shorter than eps.
    """
    check_dtype("last_token_pool", hidden.dtype)
    hidden = _flat(hidden)
    rows, width = len(index), hidden.shape[1]
    acc = accumulator(hidden.dtype)
    out = torch.empty(rows, width, dtype=hidden.dtype, device=hidden.device)
    inverse = torch.empty(rows, dtype=acc, device=hidden.device)
    if rows:
        _pool_fwd_kernel[(rows,)](
            hidden,
            index,
            out,
            inverse,
            width,
            hidden.stride(0),
            eps,
            NORMALIZE=normalize,
            ACC=TRITON_DTYPE[acc],
            BLOCK_D=_block(width),
            num_warps=4,
        )
    launch_log.note("pool_forward", rows, 0, rows * width * hidden.element_size(), launch_log.size(out, inverse))
    return out, inverse


@on_its_device
def pool_backward(grad, hidden, index, inverse, *, normalize=True) -> torch.Tensor:
    """(B, D) gradient of the gathered rows in the dtype of `hidden`, from `grad` (B, D) of the output.

    Where autograd wants the gradient of all hidden states, scatter these rows: torch.zeros_like(hidden).index_copy_.
    """
    hidden = _flat(hidden)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    rows, width = grad.shape
    out = torch.empty(rows, width, dtype=hidden.dtype, device=hidden.device)
    if rows:
        _pool_bwd_kernel[(rows,)](
            grad,
            hidden,
            index,
            inverse,
            out,
            width,
            grad.stride(0),
            hidden.stride(0),
            NORMALIZE=normalize,
            ACC=TRITON_DTYPE[inverse.dtype],
            BLOCK_D=_block(width),
            num_warps=4,
        )
    launch_log.note("pool_backward", rows, 0, launch_log.size(grad) + rows * width * hidden.element_size(), launch_log.size(out))
    return out
