"""Last-token pooling: the hidden state of each sample's last real token, L2-normalised."""

from __future__ import annotations

import torch

from contrastive_kernels.backends import choose


def last_token_rows(hidden: torch.Tensor, attention_mask=None, cu_seqlens=None) -> torch.Tensor:
    """(B,) int64 index, into `hidden` flattened to rows, of each sample's last token. See `last_token_pool`."""
    if (attention_mask is None) == (cu_seqlens is None):
        given = "both" if attention_mask is not None else "neither"
        raise ValueError(f"last_token_pool: expected one of attention_mask (padded) or cu_seqlens (packed), got {given}")
    if cu_seqlens is not None:
        if hidden.dim() != 2:
            raise ValueError(f"hidden: expected packed (T, D) with cu_seqlens, got shape {tuple(hidden.shape)}")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens: expected shape (B + 1,), got {tuple(cu_seqlens.shape)}")
        return cu_seqlens[1:].to(torch.int64) - 1
    if hidden.dim() != 3 or tuple(attention_mask.shape) != tuple(hidden.shape[:2]):
        raise ValueError(
            f"expected hidden (B, L, D) and attention_mask (B, L), got {tuple(hidden.shape)} and {tuple(attention_mask.shape)}"
        )
    batch, length = attention_mask.shape
    position = torch.arange(length, device=hidden.device)
    # the greatest position that is attended to, whichever side the padding is on; 0 where none is
    last = torch.where(attention_mask != 0, position, 0).amax(1)
    return torch.arange(batch, device=hidden.device) * length + last


def last_token_pool(hidden, *, attention_mask=None, cu_seqlens=None, normalize: bool = True, eps: float = 1e-12, backend: str = "auto"):
    """The last token's hidden state of each sample.

    Args:
        hidden: (B, L, D) padded on either side, or packed (T, D).
        attention_mask: (B, L), non-zero at real tokens; for padded input.
        cu_seqlens: (B + 1,) int, token offsets of the samples; for packed input.
        normalize: divide by the L2 norm, computed in float32 (float64 for float64), at least `eps`.
        backend: "auto" (the kernels on CUDA, torch elsewhere), "torch" or "triton".

    Returns:
        (B, D) in hidden's dtype, differentiable.

    Raises:
        ValueError: shapes that do not fit, both or neither of attention_mask and cu_seqlens.
    """
    index = last_token_rows(hidden, attention_mask, cu_seqlens)
    if choose(backend, hidden.dtype, hidden.device) == "triton":
        from contrastive_kernels.triton.pool_autograd import LastTokenPool

        return LastTokenPool.apply(hidden, index, normalize, eps)
    rows = hidden.reshape(-1, hidden.shape[-1])[index]
    if not normalize:
        return rows
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return torch.nn.functional.normalize(wide, dim=-1, eps=eps).to(rows.dtype)
