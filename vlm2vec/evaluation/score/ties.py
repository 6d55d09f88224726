"""Ties: how often a right candidate scores as a wrong one does, and what a task scores when such ties are lost.

MMEB's order lets the candidate that comes first win, and it puts the right one first: a model that gives every input the same
vector scores 100 %. The reference's number stays; beside it stands the score that a tie does not help.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

TIE = 2.0**-20  # cosines of float32 vectors that are nearer than this differ by rounding
WARN_ABOVE = 0.01  # share of tied queries


def ties(
    scores: torch.Tensor, ranked: Sequence[Sequence[int | None]], labels: Sequence[Sequence[int]]
) -> tuple[list[bool], list[list[int | None]]]:
    """Which queries are tied, and the rankings with every tie lost.

    Args:
        scores: (N, k) of the ranked candidates, descending. ranked: per query, candidates best first, None where there is none.
        labels: per query, the right candidates.

    Returns:
        (tied, lost): tied[i] is True where a right candidate and a wrong one, or the best two of which not both are right, have one
        score; lost[i] is ranked[i] with right candidates behind all wrong ones of their score.
    """
    tied, lost = [], []
    for row, candidates, label in zip(scores.double().tolist(), ranked, labels):
        right = set(label)
        pairs = [(score, candidate) for score, candidate in zip(row, candidates) if candidate is not None]
        is_right = [candidate in right for _, candidate in pairs]
        wrong_scores = [score for (score, _), good in zip(pairs, is_right) if not good]
        at = [score for (score, _), good in zip(pairs, is_right) if good]
        top = len(pairs) > 1 and pairs[0][0] - pairs[1][0] <= TIE and not all(is_right[:2])
        tied.append(top or any(abs(score - wrong) <= TIE for score in at for wrong in wrong_scores))
        order = sorted(range(len(pairs)), key=lambda place: -(pairs[place][0] - (TIE if is_right[place] else 0)))
        # equal keys: a right one exactly TIE above a wrong one, which is no tie to tell apart
        lost.append([pairs[place][1] for place in order] + [None] * (len(candidates) - len(pairs)))
    return tied, lost


def held_out_ties(query: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, readable: torch.Tensor) -> torch.Tensor:
    """(N,) bool: which readable queries' own targets score as some other readable target of another id does; by `TIE`, as above.

    Args:
        query, target: (N, D), target i the right one of query i. ids: (N,) content of the targets. readable: (N,) bool.
    """
    query, target = (torch.nn.functional.normalize(side.float(), dim=-1) for side in (query, target))
    own, tied = (query * target).sum(dim=1), torch.zeros_like(readable)
    step = max(1, 2**24 // max(1, len(target)))
    for first in range(0, len(query), step):
        rows = slice(first, first + step)
        near = ((query[rows] @ target.T) - own[rows, None]).abs() <= TIE
        other = (ids[rows, None] != ids[None]) & readable[None]
        other[torch.arange(len(other)), torch.arange(first, first + len(other))] = False
        tied[rows] = (near & other).any(dim=1) & readable[rows]
    return tied
