"""Rows of which only means were published, beside the means of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm2vec.evaluation.reproduce.rows import Row
from vlm2vec.evaluation.score.aggregate import aggregate, members
from vlm2vec.evaluation.tasks import Task


def is_part(task: Task, means: Mapping[str, Any]) -> bool:
    """Whether a task is part of one of these means."""
    return any(task.name in members().get(name, ()) for name in means)


def means_of(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{name: mean} of a run, by the names of `score.aggregate.members`."""
    found = aggregate(list(rows))
    parts = {**found.get("v3", {}).get("groups", {}), **found.get("v3", {}).get("subgroups", {})}
    return {**parts, **{name: part for name, part in found["group"].items() if "of" in part}}


def mean_lines(row: Row, rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each mean that the row prints; one whose tasks were not all run is told with their number, and not compared."""
    here, out = means_of(rows), []
    for name, there in row.means.items():
        part = here.get(name, {"tasks": 0, "of": len(members()[name])})
        done = part["tasks"] + part.get("unsupported", 0)
        compared = f"{100 * part['score']:>7.2f} {100 * (part['score'] - there):>+7.2f}" if done == part["of"] else f"{'-':>7} {'-':>7}"
        out.append(f"mean {name:<15} {100 * there:>7.2f} {compared}  {done} of {part['of']} tasks")
    return [f"{'':<20} {'there':>7} {'here':>7} {'points':>7}", *out] if out else []
