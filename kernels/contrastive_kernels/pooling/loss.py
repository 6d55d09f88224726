"""`pooled_info_nce`: hidden states in, loss out."""

from __future__ import annotations

from ..info_nce import info_nce
from . import last_token_rows, pool_rows


def pooled_info_nce(
    query_hidden,
    target_hidden,
    *,
    query_attention_mask=None,
    query_cu_seqlens=None,
    target_attention_mask=None,
    target_cu_seqlens=None,
    **options,
):
    """InfoNCE of the last tokens of two batches of hidden states, L2-normalised.

    Args:
        query_hidden, target_hidden: (B, L, D) padded on either side with their attention_mask (B, L), or packed (T, D) with their
            cu_seqlens (B + 1,). Each side may have its own layout.
        **options: the fields of `InfoNCEOptions`; `normalize` is True unless it is given, `validate` looks at masks and offsets too.

    Returns:
        As `info_nce`. Gradients reach the hidden states: (B, D) rows, put among zeros only where autograd asks for them.

    Raises:
        ValueError: shapes or options that do not fit.

    Numerics: rows are read as they are and normalised by the loss in float32, so that a bfloat16 model's embeddings are not
    rounded once more on their way.

    Example:
        >>> import torch
        >>> hidden = torch.randn(6, 8, requires_grad=True)  # two packed samples, of two and four tokens
        >>> offsets = torch.tensor([0, 2, 6])
        >>> loss = pooled_info_nce(hidden, hidden, query_cu_seqlens=offsets, target_cu_seqlens=offsets, temperature=0.5)
        >>> loss.backward()
        >>> hidden.grad.any(dim=1).tolist()  # the last tokens alone
        [False, True, False, False, False, True]
    """
    backend = options.get("backend", "auto")
    how = {"backend": backend, "validate": options.get("validate", False)}
    query_rows = last_token_rows(query_hidden, query_attention_mask, query_cu_seqlens, prefix="query_", **how)
    target_rows = last_token_rows(target_hidden, target_attention_mask, target_cu_seqlens, prefix="target_", **how)
    query = pool_rows(query_hidden, query_rows, normalize=False, backend=backend)
    target = pool_rows(target_hidden, target_rows, normalize=False, backend=backend)
    return info_nce(query, target, **{"normalize": True, **options})
