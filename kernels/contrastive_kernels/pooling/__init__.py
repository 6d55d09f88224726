"""Last-token pooling: the hidden state of each sample's last real token, L2-normalised.

    y_b = h_b / max(|h_b|, eps),  h_b = hidden[index_b]          dh_b = (g_b - (g_b . y_b) y_b) / |h_b|,  0 where |h_b| < eps

Only B rows are read. Their gradient is made as (B, D) rows too, and put among zeros of hidden's shape because autograd asks.
"""

from __future__ import annotations

import torch

from ..checks import check_tensor, may_look
from ..core.autograd.namespace import NAMESPACE
from ..core.autograd.scaled import refuse_second_derivative
from ..core.backends import choose
from ..core.option_checks import check_switches, is_finite

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def last_token_rows(
    hidden: torch.Tensor, attention_mask=None, cu_seqlens=None, prefix: str = "", backend: str = "auto", validate: bool = False
) -> torch.Tensor:
    """(B,) int64 index, into `hidden` flattened to rows, of each sample's last token; -1 for a sample without one.

    `prefix` stands before the names of the arguments in messages. See `last_token_pool`.
    """
    mask_name, packed_name, hidden_name = prefix + "attention_mask", prefix + "cu_seqlens", prefix + "hidden"
    if (attention_mask is None) == (cu_seqlens is None):
        given = "both" if attention_mask is not None else "neither"
        raise ValueError(f"{hidden_name}: expected one of {mask_name} (padded) or {packed_name} (packed), got {given}; pass one")
    packed = cu_seqlens is not None
    name, other = (packed_name, cu_seqlens) if packed else (mask_name, attention_mask)
    check_tensor(hidden_name, hidden, "(T, D)" if packed else "(B, L, D)")
    check_tensor(name, other, "(B + 1,)" if packed else "(B, L)")
    if not hidden.dtype.is_floating_point:
        raise ValueError(f"{hidden_name}: expected a floating-point tensor, got {hidden.dtype}; call .float()")
    if other.device != hidden.device:
        raise ValueError(f"{name}: expected it on {hidden.device} with {hidden_name}, got {other.device}; move it there")
    if packed:
        if hidden.dim() != 2:
            shape = tuple(hidden.shape)
            raise ValueError(f"{hidden_name}: expected packed (T, D) with {packed_name}, got shape {shape}; padded input takes {mask_name}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in INTEGERS:
            raise ValueError(
                f"{packed_name}: expected integers of shape (B + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; "
                "pass where samples begin and end, 0 first"
            )
    elif hidden.dim() != 3 or attention_mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"{hidden_name} and {mask_name}: expected (B, L, D) and (B, L), got {tuple(hidden.shape)} and {tuple(attention_mask.shape)}; "
            f"packed input takes {packed_name}"
        )
    if hidden.shape[-1] == 0:
        raise ValueError(f"{hidden_name}: expected at least one column, got shape {tuple(hidden.shape)}; check the model's width")
    chosen = choose(backend, hidden.dtype, hidden.device).name
    return _rows(attention_mask, cu_seqlens, hidden.shape[0], chosen, validate, name)


@torch.library.custom_op(f"{NAMESPACE}::last_token_rows", mutates_args=())
def _rows(
    attention_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None, tokens: int, backend: str, validate: bool, name: str
) -> torch.Tensor:
    """`last_token_rows` of one of the two; `tokens` is T of packed input. An operator, so that numbers can be looked at."""
    if cu_seqlens is not None:
        if may_look(cu_seqlens, validate):
            _check_offsets(name, cu_seqlens, tokens)
        ends = cu_seqlens[1:].to(torch.int64)
        return torch.where(ends > cu_seqlens[:-1], ends - 1, -1)
    if attention_mask.dtype != torch.bool and may_look(attention_mask, validate):
        # a mask that is added to logits, 0 for tokens and -inf or -10000 for padding, means the contrary
        off = attention_mask < 0
        if attention_mask.dtype.is_floating_point:
            off = (attention_mask != 0) & (attention_mask != 1)
        wrong = attention_mask[off]
        if len(wrong):
            raise ValueError(f"{name}: expected 1 for tokens and 0 for padding, got {wrong[0].item()}; pass (mask == 0) of an additive one")
    if backend == "triton":
        from ..triton.kernels.pool import last_token_index

        return last_token_index(attention_mask=attention_mask)
    batch, length = attention_mask.shape
    if not length:
        return torch.full((batch,), -1, device=attention_mask.device)
    # the greatest position that is attended to, whichever side the padding is on
    last = torch.where(attention_mask != 0, torch.arange(length, device=attention_mask.device), -1).amax(1)
    return torch.where(last < 0, -1, torch.arange(batch, device=attention_mask.device) * length + last)


def _check_offsets(name: str, offsets: torch.Tensor, tokens: int) -> None:
    first, last, fall = int(offsets[0]), int(offsets[-1]), bool((offsets[1:] < offsets[:-1]).any())
    if first != 0 or last > tokens or fall:
        raise ValueError(
            f"{name}: expected offsets that rise from 0 to at most T={tokens}, got {first} to {last}"
            f"{' with steps below 0' if fall else ''}; "
            "of lengths, pass the cumulative sum with 0 first"
        )


@_rows.register_fake
def _(attention_mask, cu_seqlens, tokens, backend, validate, name):
    given, count = (attention_mask, attention_mask.shape[0]) if cu_seqlens is None else (cu_seqlens, cu_seqlens.shape[0] - 1)
    return given.new_empty(count, dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::last_token_pool", mutates_args=())
def _pool(hidden: torch.Tensor, index: torch.Tensor, normalize: bool, eps: float, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, D) pooled rows of (..., D) hidden states, and (B,) what they were multiplied by, 0 for a row without direction."""
    if backend == "triton":
        from ..triton.kernels.pool import pool_forward

        return pool_forward(hidden, index, normalize=normalize, eps=eps)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    valid, rows = index >= 0, _picked(hidden, index).to(wide)
    if not normalize:
        return rows.to(hidden.dtype), valid.to(wide)
    norm = torch.linalg.vector_norm(rows, dim=1)
    return (rows / norm.clamp(min=eps)[:, None]).to(hidden.dtype), torch.where(norm < eps, 0, 1 / norm)


def _picked(hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, D) rows of `hidden` at `index`, zeros where it is -1, whatever the hidden states hold elsewhere."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    if not len(flat):
        return flat.new_zeros(len(index), flat.shape[1])
    return torch.where((index >= 0)[:, None], flat[index.clamp(min=0)], 0)


@_pool.register_fake
def _(hidden, index, normalize, eps, backend):
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(index.shape[0], hidden.shape[-1]), hidden.new_empty(index.shape[0], dtype=wide)


@torch.library.custom_op(f"{NAMESPACE}::last_token_pool_rows_gradient", mutates_args=())
def _pool_backward(
    grad: torch.Tensor, hidden: torch.Tensor, index: torch.Tensor, inverse: torch.Tensor, normalize: bool, backend: str
) -> torch.Tensor:
    """(B, D) gradient of the pooled rows' hidden states."""
    if backend == "triton":
        from ..triton.kernels.pool import pool_backward

        return pool_backward(grad, hidden, index, inverse, normalize=normalize)
    wide = torch.where((index >= 0)[:, None], grad.to(inverse.dtype) * inverse[:, None], 0)
    if normalize:
        unit = _picked(hidden, index).to(inverse.dtype) * inverse[:, None]
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
    refuse_second_derivative("last_token_pool")
    hidden, index, inverse = ctx.saved_tensors
    rows = _pool_backward(grad, hidden, index, inverse, ctx.normalize, ctx.backend)
    # rows without a token have a zero gradient and may go anywhere; an index may come twice
    flat = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device).reshape(-1, hidden.shape[-1])
    if not len(flat):
        return flat.reshape(hidden.shape), None, None, None, None
    return flat.index_put((index.clamp(min=0),), rows, accumulate=True).reshape(hidden.shape), None, None, None, None


_pool.register_autograd(_differentiate, setup_context=_save)


def last_token_pool(
    hidden,
    *,
    attention_mask=None,
    cu_seqlens=None,
    normalize: bool = True,
    eps: float = 1e-12,
    backend: str = "auto",
    validate: bool = False,
):
    """The last token's hidden state of each sample.

    Args:
        hidden: (B, L, D) padded on either side, or packed (T, D).
        attention_mask: (B, L), non-zero at real tokens; for padded input.
        cu_seqlens: (B + 1,) int, token offsets of the samples, from 0 to at most T; for packed input.
        normalize: divide by the L2 norm, computed in float32 (float64 for float64), at least `eps`.
        backend: "auto" (the kernels on CUDA, torch elsewhere), "torch" or "triton".
        validate: run the checks that would wait for a GPU: offsets that do not rise from 0 to at most T, an additive mask.

    Returns:
        (B, D) in hidden's dtype, differentiable once; zeros for a sample without a token.

    Raises:
        ValueError: shapes or offsets that do not fit, both or neither of attention_mask and cu_seqlens.

    Example:
        >>> import torch
        >>> hidden = torch.arange(12.0).view(2, 3, 2)
        >>> mask = torch.tensor([[1, 1, 0], [0, 1, 1]])  # one padded on the right, one on the left
        >>> last_token_pool(hidden, attention_mask=mask, normalize=False)
        tensor([[ 2.,  3.],
                [10., 11.]])
        >>> last_token_pool(hidden.view(6, 2), cu_seqlens=torch.tensor([0, 2, 6]), normalize=False)
        tensor([[ 2.,  3.],
                [10., 11.]])
    """
    check_switches(normalize=normalize, validate=validate)
    if not is_finite(eps) or eps <= 0:
        raise ValueError(f"eps: expected a number above 0, got {eps!r}; 1e-12 is the default")
    index = last_token_rows(hidden, attention_mask, cu_seqlens, backend=backend, validate=validate)
    return pool_rows(hidden, index, normalize=normalize, eps=eps, backend=backend)


def pool_rows(hidden, index, *, normalize: bool, eps: float = 1e-12, backend: str = "auto"):
    """(B, D) rows of `hidden` at `index` (B,), which `last_token_rows` has made; zeros where it is -1. See `last_token_pool`."""
    return _pool(hidden, index, normalize, eps, choose(backend, hidden.dtype, hidden.device).name)[0]
