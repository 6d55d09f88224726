"""Means as the papers take them: unweighted over data sets, within a meta-task, group, IND/OOD half, modality, and overall.

The overall mean is over data sets, not over modalities or meta-tasks. A mean over fewer data sets than the papers have
is marked by its count, so that a part of the benchmark is not mistaken for the whole.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from vlm2vec.evaluation.tasks import known_tasks, load_tasks

V3_GROUPS = {  # of MMEB-V3, by the modalities of their tasks; image holds MCMR, as the leaderboard's does
    "image": ("image",),
    "video": ("video",),
    "visdoc": ("visdoc",),
    "text": ("text",),
    "agent": ("tool", "gui", "memory"),
    "tool": ("tool",),
    "gui": ("gui",),
    "memory": ("memory",),
    "audio": ("audio",),
    "Overall-V3": ("text", "tool", "gui", "memory", "audio"),
}
VIDORE_V3 = "vidore_v3"  # a benchmark of its own, by NDCG@10: a group mean over its ten sets, and part of no other mean
PAPER_NAMES = {"text_reasoning": "RR", "text_instruction": "IF", "text_long": "LC", "text_conditions": "MC", "text_general": "GR"}


def _mean(rows):
    return sum(r["score"] for r in rows) / len(rows)


@lru_cache(maxsize=1)
def _v3_members() -> dict[str, dict[str, list[str]]]:
    """{"groups" | "subgroups" | "sets": {name: tasks}} of MMEB-V3."""
    parts = {"groups": {}, "subgroups": {}, "sets": {}}
    for name, task in load_tasks("v3").items():
        groups = [group for group, modalities in V3_GROUPS.items() if task.modality in modalities]
        groups += ["V3-All", *(["V2"] if name in load_tasks() else []), *(["MCMR"] if name == "MCMR" else [])]
        groups += ["image36"] if task.modality == "image" and name != "MCMR" else []
        for group in groups:
            parts["groups"].setdefault(group, []).append(name)
        if task.group != "mcmr":  # which is a group already
            parts["subgroups"].setdefault(PAPER_NAMES.get(task.group, task.group), []).append(name)
        if "/" in name and task.modality in ("text", "tool"):  # of the memories each set is a subgroup
            parts["sets"].setdefault(name.split("/")[1], []).append(name)
    return parts


@lru_cache(maxsize=1)
def members() -> dict[str, list[str]]:
    """{name of a mean: its tasks}: MMEB-V3's groups and subgroups, and ViDoRe V3."""
    parts = _v3_members()
    vidore = [name for name, task in known_tasks().items() if task.group == VIDORE_V3]
    return {**parts["subgroups"], **parts["groups"], VIDORE_V3: vidore}


def v3_means(scores: dict[str, float | None]) -> dict[str, dict[str, dict[str, float | int]]]:
    """MMEB-V3's means over per-task scores: every task weighs the same in every mean that it is part of.

    Args:
        scores: {task: score in any unit, or None where the model cannot do the task}. Tasks outside of MMEB-V3 are left out.

    Returns:
        {"groups": {name: mean}, "subgroups": {name: mean}, "sets": {name: mean}}, each mean {"score": unsupported tasks counted 0,
        "ran": mean over what was run or None, "tasks": tasks with a score, "unsupported": tasks without, "of": tasks of the whole}.
        Groups: those of `V3_GROUPS`, "V2" (its 78 tasks), "image36" (without MCMR), "MCMR", and "V3-All". Subgroups: the tasks'
        groups, the text's under the paper's names (RR, IF, LC, MC, GR). Sets: those that a task's name holds (BRIGHT, web, ...).
    """
    parts = _v3_members()

    def mean(names):
        ran = [scores[name] for name in names if scores.get(name) is not None]
        without = sum(name in scores and scores[name] is None for name in names)
        counted = len(ran) + without
        return {
            "score": sum(ran) / counted if counted else 0.0,
            "ran": sum(ran) / len(ran) if ran else None,
            "tasks": len(ran),
            "unsupported": without,
            "of": len(names),
        }

    found = {kind: {name: mean(names) for name, names in of.items()} for kind, of in parts.items()}
    return {kind: {name: part for name, part in of.items() if part["tasks"] + part["unsupported"]} for kind, of in found.items()}


def _by_first(row: dict[str, Any]) -> float | None:
    """A task's score, of a text task hit@1, by which the leaderboard ranks them; the papers print ndcg_linear@5."""
    by_first = row.get("metrics", {}).get("hit@1") if row["modality"] == "text" else None
    return row["score"] if by_first is None else by_first


def aggregate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over per-task summaries.

    Args: rows, dicts with "task", "score" (fraction; None where the model cannot do the task), "meta_task", "group", "split", "modality".

    Returns: {"meta_task": {name: {"score", "tasks"}}, "group": .., "split": .., "modality": .., "overall": {..},
        "complete": {"v1": bool, "v2": bool}}; parts without tasks are left out. ViDoRe V3's sets are in their group's mean alone
        ("of": ten) where other tasks are there too. With a task that only MMEB-V3 has also
        "v3": `v3_means` with the text tasks also by hit@1, and "complete" tells of all 190.
    """
    out, all_rows = {}, rows
    rows = [row for row in rows if row["score"] is not None]
    scored, rest = rows, [row for row in rows if row.get("group") != VIDORE_V3]
    rows = rest or rows
    for field in ("meta_task", "group", "split", "modality"):
        part = {}
        for row in scored if field == "group" else rows:
            if row.get(field):
                part.setdefault(row[field], []).append(row)
        out[field] = {name: {"score": _mean(members), "tasks": len(members)} for name, members in part.items()}
    if VIDORE_V3 in out["group"]:
        out["group"][VIDORE_V3]["of"] = len(members()[VIDORE_V3])
    out["overall"] = {"score": _mean(rows), "tasks": len(rows)} if rows else {"score": 0.0, "tasks": 0}
    names = {row["task"] for row in rows}
    table, v3 = load_tasks(), load_tasks("v3")
    v1 = {name for name, task in table.items() if task.modality == "image"}
    out["complete"] = {"v1": names == v1, "v2": names == set(table)}
    if any(row["task"] in v3 and row["task"] not in table for row in all_rows):
        out["v3"] = v3_means({row["task"]: row["score"] for row in all_rows})
        first = v3_means({row["task"]: _by_first(row) for row in all_rows})["groups"]
        out["v3"]["text by hit@1"] = {f"{name}, text by hit@1": first[name] for name in ("text", "V3-All") if name in first}
        out["complete"]["v3"] = {row["task"] for row in all_rows} >= set(v3)
    return out
