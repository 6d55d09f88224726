"""Last-token pooling: the hidden state of each sample's last real token, L2-normalised.

    y_b = h_b / max(|h_b|, eps),  h_b = hidden[index_b]          dh_b = (g_b - (g_b . y_b) y_b) / |h_b|,  0 where |h_b| < eps

Only B rows are read. Their gradient is made as (B, D) rows too, and put among zeros of hidden's shape because autograd asks.
"""

from __future__ import annotations

import torch

from contrastive_kernels.backends import choose


def last_token_rows(hidden: torch.Tensor, attention_mask=None, cu_seqlens=None, prefix: str = "") -> torch.Tensor:
    """(B,) int64 index, into `hidden` flattened to rows, of each sample's last token; -1 for a sample without one.

    `prefix` stands before the names of the arguments in messages. See `last_token_pool`.
    """
    mask_name, packed_name, hidden_name = prefix + "attention_mask", prefix + "cu_seqlens", prefix + "hidden"
    if (attention_mask is None) == (cu_seqlens is None):
        given = "both" if attention_mask is not None else "neither"
        raise ValueError(f"{hidden_name}: expected one of {mask_name} (padded) or {packed_name} (packed), got {given}")
    if not hidden.dtype.is_floating_point:
        raise ValueError(f"{hidden_name}: expected a floating-point tensor, got {hidden.dtype}; call .float()")
    other = attention_mask if cu_seqlens is None else cu_seqlens
    if other.device != hidden.device:
        name = mask_name if cu_seqlens is None else packed_name
        raise ValueError(f"{name}: expected it on {hidden.device} with {hidden_name}, got {other.device}; move it there")
    if cu_seqlens is not None:
        if hidden.dim() != 2:
            raise ValueError(f"{hidden_name}: expected packed (T, D) with {packed_name}, got shape {tuple(hidden.shape)}")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype.is_floating_point:
            raise ValueError(f"{packed_name}: expected integers of shape (B + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
        ends = cu_seqlens[1:].to(torch.int64)
        return torch.where(ends > cu_seqlens[:-1], ends - 1, -1)
    if hidden.dim() != 3 or tuple(attention_mask.shape) != tuple(hidden.shape[:2]):
        raise ValueError(
            f"expected {hidden_name} (B, L, D) and {mask_name} (B, L), got {tuple(hidden.shape)} and {tuple(attention_mask.shape)}"
        )
    batch, length = attention_mask.shape
    # the greatest position that is attended to, whichever side the padding is on
    last = torch.where(attention_mask != 0, torch.arange(length, device=hidden.device), -1).amax(1)
    return torch.where(last < 0, -1, torch.arange(batch, device=hidden.device) * length + last)


@torch.library.custom_op("contrastive_kernels::last_token_pool", mutates_args=())
def _pool(hidden: torch.Tensor, index: torch.Tensor, normalize: bool, eps: float, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, D) pooled rows of (..., D) hidden states, and (B,) what they were multiplied by, 0 for a row without direction."""
    if backend == "triton":
        from contrastive_kernels.triton.pool import pool_forward

        return pool_forward(hidden, index, normalize=normalize, eps=eps)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    flat, there = hidden.reshape(-1, hidden.shape[-1]), index >= 0
    rows = torch.where(there[:, None], flat[index.clamp(min=0)].to(wide), 0)
    if not normalize:
        return rows.to(hidden.dtype), there.to(wide)
    norm = torch.linalg.vector_norm(rows, dim=1)
    return (rows / norm.clamp(min=eps)[:, None]).to(hidden.dtype), torch.where(norm < eps, 0, 1 / norm)


@_pool.register_fake
def _(hidden, index, normalize, eps, backend):
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(index.shape[0], hidden.shape[-1]), hidden.new_empty(index.shape[0], dtype=wide)


@torch.library.custom_op("contrastive_kernels::last_token_pool_rows_gradient", mutates_args=())
def _pool_backward(
    grad: torch.Tensor, hidden: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, normalize: bool, backend: str
) -> torch.Tensor:
    """(B, D) gradient of the pooled rows' hidden states."""
    if backend == "triton":
        from contrastive_kernels.triton.pool import pool_backward

        return pool_backward(grad, hidden, index, inverse, normalize=normalize)
    wide = grad.to(inverse.dtype) * inverse[:, None]
    if normalize:
        unit = hidden.reshape(-1, hidden.shape[-1])[index.clamp(min=0)].to(inverse.dtype) * inverse[:, None]
        wide = wide - torch.linalg.vecdot(wide, unit)[:, None] * unit
    return wide.to(hidden.dtype)


@_pool_backward.register_fake
def _(grad, hidden, index, inverse, normalize, backend):
    return hidden.new_empty(grad.shape)


def _save(ctx, inputs, output):
    hidden, index, ctx.normalize, _, ctx.backend = inputs
    ctx.save_for_backward(hidden, index, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return None, None, None, None, None
    hidden, index, inverse = ctx.saved_tensors
    rows = _pool_backward(grad, hidden, index, inverse, ctx.normalize, ctx.backend)
    # rows without a token have a zero gradient and may go anywhere; an index may come twice
    whole = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device).reshape(-1, hidden.shape[-1])
    return whole.index_put((index.clamp(min=0),), rows, accumulate=True).reshape(hidden.shape), None, None, None, None


_pool.register_autograd(_differentiate, setup_context=_save)


def last_token_pool(hidden, *, attention_mask=None, cu_seqlens=None, normalize: bool = True, eps: float = 1e-12, backend: str = "auto"):
    """The last token's hidden state of each sample.

    Args:
        hidden: (B, L, D) padded on either side, or packed (T, D).
        attention_mask: (B, L), non-zero at real tokens; for padded input.
        cu_seqlens: (B + 1,) int, token offsets of the samples; for packed input.
        normalize: divide by the L2 norm, computed in float32 (float64 for float64), at least `eps`.
        backend: "auto" (the kernels on CUDA, torch elsewhere), "torch" or "triton".

    Returns:
        (B, D) in hidden's dtype, differentiable; zeros for a sample without a token.

    Raises:
        ValueError: shapes that do not fit, both or neither of attention_mask and cu_seqlens.
    """
    return pool_rows(hidden, last_token_rows(hidden, attention_mask, cu_seqlens), normalize=normalize, eps=eps, backend=backend)


def pool_rows(hidden, index, *, normalize: bool, eps: float = 1e-12, backend: str = "auto"):
    """(B, D) rows of `hidden` at `index` (B,), which `last_token_rows` has made; zeros where it is -1. See `last_token_pool`."""
    return _pool(hidden, index, normalize, eps, choose(backend, hidden.dtype, hidden.device))[0]
