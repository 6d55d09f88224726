"""Ranking metrics with the reference's conventions: hit, nDCG (linear, exponential), precision, recall, F1, MAP, MRR.

Everything is computed from one (queries, k) table of grades: the relevance of what stands at each rank, 0 for a
candidate that is no label. Conventions, where libraries differ (and what MMEB-V2's score files hold):

* precision@k divides by k, also when fewer than k candidates were ranked;
* average precision divides by min(number of labels, k) (ranx and pytrec_eval divide by the number of labels);
* ideal DCG counts labels that are not among the candidates, and grades 0 count as labels for all but nDCG;
* a query without labels scores recall 1 and 0 in everything else;
* a label given twice counts once, with the higher grade.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np

KS = (1, 5, 10)
METRICS = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")


def relevance_table(
    ranked: Sequence[Sequence[Hashable | None]],
    labels: Sequence[Sequence[Hashable]],
    grades: Sequence[Sequence[float] | None] | None = None,
    *,
    depth: int = KS[-1],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Grades found at each rank, and the labels' own grades from best to worst.

    Args:
        ranked: per query, candidates best first (any hashable; None or -1 stands for "no candidate").
        labels: per query, the relevant candidates.
        grades: per query, None (binary) or one number >= 0 for each label.
        depth: ranks looked at.

    Returns:
        (found, is_label, ideal, count): found (N, depth) float64, is_label (N, depth) bool, ideal (N, depth) float64
        sorted descending, count (N,) int64 number of distinct labels.
    """
    grades = [None] * len(labels) if grades is None else grades
    if not len(ranked) == len(labels) == len(grades):
        raise ValueError(f"expected one ranking, label list and grade list per query, got {len(ranked)}, {len(labels)} and {len(grades)}")
    gained = np.zeros((len(ranked), depth))
    is_label = np.zeros((len(ranked), depth), dtype=bool)
    ideal = np.zeros((len(ranked), depth))
    count = np.zeros(len(ranked), dtype=np.int64)
    for i, (row, label, grade) in enumerate(zip(ranked, labels, grades)):
        if grade is not None and len(grade) != len(label):
            raise ValueError(f"query {i}: {len(label)} labels but {len(grade)} relevance scores; give one for each label")
        best = {}
        for name, value in zip(label, grade if grade is not None else [1.0] * len(label)):
            best[name] = max(float(value), best.get(name, 0.0))
        count[i] = len(best)
        for j, name in enumerate(row[:depth]):
            value = best.get(name)
            if value is not None:
                gained[i, j], is_label[i, j] = value, True
        top = sorted(best.values(), reverse=True)[:depth]
        ideal[i, : len(top)] = top
    return gained, is_label, ideal, count


def _ratio(top, bottom):
    return np.divide(top, bottom, out=np.zeros_like(top, dtype=np.float64), where=bottom > 0)


def per_query_metrics(
    ranked: Sequence[Sequence[Hashable | None]],
    labels: Sequence[Sequence[Hashable]],
    grades: Sequence[Sequence[float] | None] | None = None,
    *,
    ks: Iterable[int] = KS,
) -> dict[str, np.ndarray]:
    """{"metric@k": (N,) float64} for every metric of `METRICS` and every k; see the module text for conventions."""
    ks = sorted(set(int(k) for k in ks))
    if not ks or ks[0] < 1:
        raise ValueError(f"expected cut-offs of at least 1, got {ks}")
    gained, is_label, ideal, count = relevance_table(ranked, labels, grades, depth=ks[-1])
    rank = np.arange(1, ks[-1] + 1)
    discount = 1.0 / np.log2(rank + 1.0)
    hits = np.cumsum(is_label, axis=1)
    out = {}
    for k in ks:
        hit_count = hits[:, k - 1].astype(np.float64)
        precision = hit_count / k
        recall = np.where(count > 0, _ratio(hit_count, count), 1.0)
        precise = np.sum(is_label[:, :k] * hits[:, :k] / rank[:k], axis=1)
        first = np.where(is_label[:, :k].any(axis=1), 1.0 / (1.0 + is_label[:, :k].argmax(axis=1)), 0.0)
        out[f"hit@{k}"] = (hit_count > 0).astype(np.float64)
        for name, gain in (("ndcg_linear", lambda g: g), ("ndcg_exponential", lambda g: np.exp2(g) - 1.0)):
            best = np.sum(gain(ideal[:, :k]) * discount[:k], axis=1)
            out[f"{name}@{k}"] = _ratio(np.sum(gain(gained[:, :k]) * discount[:k], axis=1), best)
        out[f"precision@{k}"] = precision
        out[f"recall@{k}"] = recall
        out[f"f1@{k}"] = _ratio(2 * precision * recall, precision + recall)
        out[f"map@{k}"] = _ratio(precise, np.minimum(count, k))
        out[f"mrr@{k}"] = first
    return out


def mean_of(values: np.ndarray, parts: Sequence[str] | None = None) -> float:
    """The mean of per-query values, or with `parts` (the part that each query belongs to) the mean over parts of their means."""
    if parts is None:
        return float(values.mean())
    names = np.asarray(parts)
    return float(np.mean([values[names == name].mean() for name in dict.fromkeys(parts)]))


def ranking_metrics(
    ranked: Sequence[Sequence[Hashable | None]],
    labels: Sequence[Sequence[Hashable]],
    grades: Sequence[Sequence[float] | None] | None = None,
    *,
    ks: Iterable[int] = KS,
) -> dict[str, float]:
    """Means over queries, in the key order of the reference's score files: {"hit@1": .., "hit@5": .., ...}.

    Args, conventions: see `per_query_metrics`. No queries at all gives 0 everywhere.
    """
    table = per_query_metrics(ranked, labels, grades, ks=ks)
    return {f"{metric}@{k}": float(table[f"{metric}@{k}"].mean()) if len(ranked) else 0.0 for metric in METRICS for k in sorted(set(ks))}
