"""Means as the papers take them: unweighted over data sets, within a meta-task, group, IND/OOD half, modality, and overall.

The overall mean is over data sets, not over modalities or meta-tasks. A mean over fewer data sets than the papers have
is marked by its count, so that a part of the benchmark is not mistaken for the whole.
"""

from __future__ import annotations

from typing import Any

from vlm2vec.evaluation.tasks import load_tasks


def _mean(rows):
    return sum(r["score"] for r in rows) / len(rows)


def aggregate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over per-task summaries.

    Args: rows, dicts with "task", "score" (fraction), "meta_task", "group", "split", "modality".

    Returns: {"meta_task": {name: {"score", "tasks"}}, "group": .., "split": .., "modality": .., "overall": {..},
        "complete": {"v1": bool, "v2": bool}}; parts without tasks are left out.
    """
    out = {}
    for field in ("meta_task", "group", "split", "modality"):
        part = {}
        for row in rows:
            if row.get(field):
                part.setdefault(row[field], []).append(row)
        out[field] = {name: {"score": _mean(members), "tasks": len(members)} for name, members in part.items()}
    out["overall"] = {"score": _mean(rows), "tasks": len(rows)} if rows else {"score": 0.0, "tasks": 0}
    names = {row["task"] for row in rows}
    table = load_tasks()
    v1 = {name for name, task in table.items() if task.modality == "image"}
    out["complete"] = {"v1": names == v1, "v2": names == set(table)}
    return out
