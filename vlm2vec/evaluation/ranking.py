"""Ranking candidates for queries: global lists through `topk_similarity`, local lists in chunks; never all scores at once.

Ties: the candidate that comes first in the data wins. MMEB puts the positive first, so a tie with it counts as correct
(as in V1, where argmax returns the first); V2 leaves ties undefined, and we use the same rule. Candidates with equal
content share one vector, so their scores are equal to the last bit and the rule decides between them.
"""

import torch

CHUNK_BYTES = 64 * 2**20


def rank(query, target, k, *, local=None, target_row=None, blocked=None):
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
    row = torch.arange(len(target)) if target_row is None else torch.as_tensor(target_row, dtype=torch.int64)
    blocked = torch.zeros(len(row), dtype=torch.bool) if blocked is None else torch.as_tensor(blocked)
    if len(query) == 0 or len(row) == 0 or k < 1:
        return torch.full((len(query), max(k, 0)), float("-inf")), torch.full((len(query), max(k, 0)), -1)
    if local is None:
        return _rank_global(query, target, k, row, blocked)
    if len(local) != len(query):
        raise ValueError(f"expected one candidate list per query, got {len(local)} for {len(query)}")
    return _rank_local(query, target, k, local, row, blocked)


def _rank_global(query, target, k, row, blocked):
    """Top k of the distinct vectors, each then stands for its candidates in their order."""
    from contrastive_kernels import topk_similarity

    members = [[] for _ in range(len(target))]
    for candidate, (vector, skip) in enumerate(zip(row.tolist(), blocked.tolist())):
        if not skip:
            members[vector].append(candidate)
    kept = [v for v, group in enumerate(members) if group]
    # in the order of their first candidate, so that "lowest index wins" means the data's order
    kept.sort(key=lambda v: members[v][0])
    if not kept:
        return torch.full((len(query), k), float("-inf")), torch.full((len(query), k), -1)
    identity = kept == list(range(len(target)))
    used = target if identity else target[torch.tensor(kept, device=target.device)]
    width = min(k, len(kept))
    scores, vectors = (t.cpu() for t in topk_similarity(query, used, width))
    if all(len(members[v]) == 1 for v in kept):
        single = torch.tensor([members[v][0] for v in kept])
        indices = torch.where(vectors >= 0, single[vectors.clamp(min=0)], -1)
        return _pad(scores.float(), indices, k)
    out_scores, out = torch.full((len(query), k), float("-inf")), torch.full((len(query), k), -1)
    for i in range(len(query)):
        place = 0
        for score, v in zip(scores[i].tolist(), vectors[i].tolist()):
            for candidate in members[kept[v]][: k - place] if v >= 0 else ():
                out_scores[i, place], out[i, place] = score, candidate
                place += 1
            if place == k:
                break
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
