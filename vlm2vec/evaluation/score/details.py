"""What the summary of a task tells besides its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm2vec.evaluation.score.metrics import mean_of, per_query_metrics
from vlm2vec.evaluation.score.ranking import without

if TYPE_CHECKING:
    from vlm2vec.evaluation.tasks.task_data import TaskData

Ranked = Sequence[Sequence[int | None]]


def v3_facts(options: Any) -> dict[str, str]:
    """What score files say besides scores where there are several published evaluations, whose scores cannot be compared."""
    several = options.protocol == "v3" or options.feeding != "official"
    return {"protocol": options.protocol, "feeding": options.feeding} if several else {}


def other_metric(ranked: Ranked, labels: Sequence[Sequence[int]], grades: Any, metric: str, parts: Sequence[str] | None = None) -> float:
    """One metric at any cut-off, such as "hit@3", as the mean over queries, or over parts of their means."""
    k = int(metric.partition("@")[2])
    return mean_of(per_query_metrics(ranked, labels, grades, ks=(k,))[metric], parts)


def chance(data: TaskData) -> float:
    """hit@1 of a random order: the share of right candidates, averaged over queries."""
    sizes = [len(c) for c in data.local] if data.local is not None else [len(data.candidates)] * len(data.labels)
    right = [len({c for c in row if c >= 0}) for row in data.labels]
    return sum(r / s for r, s in zip(right, sizes) if s) / max(1, len(sizes))


def parts_and_exclusions(data: TaskData, ranked: Ranked, labels: Sequence[Sequence[int]], table: dict[str, np.ndarray]) -> dict[str, Any]:
    """What some tasks tell besides their score: each part's (a language's), and the benchmark's own without candidates that it excludes.

    Returns: {"parts": {name: {"score", "queries"}}} and {"without_excluded": {"score", "queries": those that exclude any}}, as far as
        the data has them.
    """
    out: dict[str, Any] = {}
    metric = data.task.metric
    if data.parts is not None:
        values = (
            table[metric] if metric in table else per_query_metrics(ranked, labels, data.grades, ks=(int(metric.split("@")[1]),))[metric]
        )
        of = {name: [i for i, part in enumerate(data.parts) if part == name] for name in dict.fromkeys(data.parts)}
        out["parts"] = {name: {"score": float(values[rows].mean()), "queries": len(rows)} for name, rows in of.items()}
    if data.excluded is not None:
        score = other_metric(without(ranked, data.excluded), labels, data.grades, metric, data.parts)
        out["without_excluded"] = {"score": score, "queries": sum(map(bool, data.excluded))}
    return out


def cut_texts(prepared: Any, store: Any) -> dict[str, Any]:
    """{"cut_texts": {"queries", "candidates"}}: how many of a task's texts were longer than the model's limit; {} where none was."""
    sides = {"queries": prepared.query_keys, "candidates": prepared.candidate_keys}
    cut = {side: sum(key in store.cut for key in keys) for side, keys in sides.items()} if store.cut else {}
    return {"cut_texts": cut} if any(cut.values()) else {}
