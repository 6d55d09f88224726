"""Exact search by inner product over mapped vectors, segment after segment; nothing is copied and no N x M is built."""

from __future__ import annotations

import torch

from contrastive_kernels import topk_similarity


def nearest(queries: torch.Tensor, segments: list[torch.Tensor], k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest inner products of each query with all rows.

    Args:
        queries: (Q, D) float32 on the CPU.
        segments: (n, D) float32 each; rows are counted through them.
        k: at most so many; fewer where there are fewer rows.

    Returns:
        (scores (Q, k) float32, rows (Q, k) int64), best first, of equal scores the lower row first.
    """
    scores, places, start = [], [], 0
    for vectors in segments:
        found, where = topk_similarity(queries, vectors, min(k, len(vectors)))
        scores.append(found)
        places.append(where + start)
        start += len(vectors)
    scores, places = torch.cat(scores, 1), torch.cat(places, 1)
    best, order = scores.sort(dim=1, descending=True, stable=True)
    k = min(k, start)
    return best[:, :k], places.gather(1, order[:, :k])
