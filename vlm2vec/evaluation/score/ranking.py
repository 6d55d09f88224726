"""Ranking candidates for queries: global lists through `topk_similarity`, local lists in chunks; never all scores at once.

Ties: the candidate that comes first in the data wins. MMEB puts the positive first, so a tie with it counts as correct
(as in V1, where argmax returns the first); V2 leaves ties undefined, and we use the same rule. Candidates with equal
content share one vector, so their scores are equal to the last bit and the rule decides between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

CHUNK_BYTES = 64 * 2**20
WORKSPACE_MIB = 128  # of the search among all candidates


def rank(
    query: torch.Tensor,
    target: torch.Tensor,
    k: int,
    *,
    local: Sequence[Sequence[int]] | None = None,
    target_row: Sequence[int] | torch.Tensor | None = None,
    blocked: Sequence[bool] | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k candidates of each query.

    Args:
        query: (N, D) float, normalised. target: (U, D) float, distinct vectors, same device.
        k: ranks wanted.
        local: per query, candidate indices in the order of the data; None ranks all candidates.
        target_row: (M,) int64, the vector of each candidate, or None when candidate i has vector i.
        blocked: (M,) bool, candidates that must not be ranked (unreadable), or None.

    Returns: (scores (N, k) float32, indices (N, k) int64 candidate numbers) on the CPU; -inf and -1 where there are
        fewer than k candidates.
    """
    if query.ndim != 2 or target.ndim != 2 or query.shape[1] != target.shape[1]:
        raise ValueError(f"expected query (N, D) and target (U, D) of one width, got {tuple(query.shape)} and {tuple(target.shape)}")
    if local is None and target_row is None and blocked is None and len(query) and len(target) and k >= 1:
        return _pad(*_best(query, target, k), k)  # vectors are candidates: no tables of a million rows
    row = torch.arange(len(target)) if target_row is None else torch.as_tensor(target_row, dtype=torch.int64)
    blocked = torch.zeros(len(row), dtype=torch.bool) if blocked is None else torch.as_tensor(blocked)
    if len(query) == 0 or len(row) == 0 or k < 1:
        return torch.full((len(query), max(k, 0)), float("-inf")), torch.full((len(query), max(k, 0)), -1)
    if local is None:
        return _rank_global(query, target, k, row, blocked)
    if len(local) != len(query):
        raise ValueError(f"expected one candidate list per query, got {len(local)} for {len(query)}")
    return _rank_local(query, target, k, local, row, blocked)


def without(ranked: Sequence[Sequence[int | None]], left_out: Sequence[Sequence[int]]) -> list[list[int | None]]:
    """Rankings without the candidates that a query leaves out; what stands behind moves up."""
    return [[c for c in row if c is None or c not in gone] for row, gone in zip(ranked, map(set, left_out))]


def _best(query, target, k):
    """(scores float32, vector numbers) of the best min(k, U) vectors, on the CPU."""
    from contrastive_kernels import topk_similarity

    scores, indices = topk_similarity(query, target, min(k, len(target)), workspace_mib=WORKSPACE_MIB)
    return scores.float().cpu(), indices.cpu()


def _rank_global(query, target, k, row, blocked):
    """Top k of the distinct vectors, each then stands for its candidates in their order."""
    free = (~blocked).nonzero()[:, 0]
    vector = row[free]
    # the first candidate of each vector; vectors in that order, so that "lowest index wins" means the data's order
    first = torch.full((len(target),), len(row)).scatter_reduce(0, vector, free, "amin")
    count = torch.bincount(vector, minlength=len(target))
    used_vectors = first.argsort(stable=True)[: int((count > 0).sum())]
    if not len(used_vectors):
        return torch.full((len(query), k), float("-inf")), torch.full((len(query), k), -1)
    ordered = len(used_vectors) == len(target) and bool((used_vectors[1:] > used_vectors[:-1]).all())
    used = target if ordered else target[used_vectors.to(target.device)]
    scores, nearest = _best(query, used, k)
    if int(count.max()) == 1:
        return _pad(scores, torch.where(nearest >= 0, first[used_vectors][nearest.clamp(min=0)], -1), k)
    # members[start[v] : start[v] + count[v]] are the candidates of vector v, in order
    members = free[vector.argsort(stable=True)]
    start = count.cumsum(0) - count
    out_scores, out = torch.full((len(query), k), float("-inf")), torch.full((len(query), k), -1)
    for i in range(len(query)):
        hits = used_vectors[nearest[i][nearest[i] >= 0]]
        candidates = torch.cat([members[int(start[v]) : int(start[v] + count[v])] for v in hits])[:k]
        repeated = scores[i, : len(hits)].repeat_interleave(count[hits])[:k]
        out_scores[i, : len(candidates)], out[i, : len(candidates)] = repeated, candidates
    return out_scores, out


def _rank_local(query, target, k, local, row, blocked):
    """Chunks of queries: either all scores of the chunk and a gather, or the gathered vectors themselves."""
    device = query.device
    longest = max((len(c) for c in local), default=0)
    width = min(k, longest)
    if width == 0:
        return torch.full((len(query), k), float("-inf")), torch.full((len(query), k), -1)
    dense = len(target) <= max(4 * longest, 4096)
    floats = len(target) + 3 * longest if dense else longest * (query.shape[1] + 3)
    step = max(1, CHUNK_BYTES // (4 * floats))
    all_scores, all_indices = [], []
    for start in range(0, len(query), step):
        lists = local[start : start + step]
        table = torch.full((len(lists), longest), -1)
        for i, candidates in enumerate(lists):
            table[i, : len(candidates)] = torch.as_tensor(candidates, dtype=torch.int64)
        invalid = table < 0
        safe = table.clamp(min=0)
        invalid |= blocked[safe]
        vectors = row[safe].to(device)
        q_chunk = query[start : start + step]
        if dense:
            scores = (q_chunk.float() @ target.float().T).gather(1, vectors)
        else:
            scores = torch.einsum("nd,ncd->nc", q_chunk.float(), target[vectors].float())
        scores = scores.cpu().masked_fill(invalid, float("-inf"))
        # stable: among equal scores the first of the list stays first
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :width]
        top = scores.gather(1, order)
        all_scores.append(top)
        all_indices.append(torch.where(torch.isneginf(top), -1, table.gather(1, order)))
    return _pad(torch.cat(all_scores), torch.cat(all_indices), k)


def _pad(scores, indices, k):
    """Widen to k columns; candidates that may not be ranked become -1."""
    indices = torch.where(torch.isneginf(scores), -1, indices)
    if scores.shape[1] == k:
        return scores, indices
    more = (len(scores), k - scores.shape[1])
    return torch.cat([scores, torch.full(more, float("-inf"))], 1), torch.cat([indices, torch.full(more, -1)], 1)
