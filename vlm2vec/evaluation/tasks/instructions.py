"""MMEB-V2 as Qwen3-VL-Embedding's authors feed it: a task's instruction apart from the query, candidates without a sentence of the task."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm2vec.evaluation.tasks.task import Task
from vlm2vec.files.documents import read_yaml

FILE = Path(__file__).resolve().parent / "instructions.yaml"


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    return read_yaml(FILE)


def instruction_of(task: Task) -> str | dict[str, str]:
    """The task's instruction; MomentSeeker has one for each kind of query ("text", "image", "video").

    Raises: ValueError for a task that nobody published one for.

    Example:
        >>> instruction_of(load_tasks()["K700"])
        'Recognize the category of the video content.'
    """
    found = _table()["tasks"].get(task.name) or _table()["groups"].get(task.group)
    if found is None:
        raise ValueError(
            f"task {task.name}: expected a task of MMEB-V2 with --feeding authors, got one without a published instruction; leave it out"
        )
    return found


def bare_task(task: Task) -> Task:
    """The task with nothing around its queries and candidates; images keep their prompts, which `load_mmeb` leaves out itself."""
    options = {**task.options, "instruction_apart": True}
    if task.loader == "mmeb":
        return replace(task, options=options)
    instruction_of(task)
    prompt = dict.fromkeys(task.query_prompt, "{text}") if isinstance(task.query_prompt, dict) else "{text}"
    return replace(task, query_prompt=prompt, target_prompt="", options={**options, **_table()["options"].get(task.name, {})})


def instructed(task: Task, query: dict[str, Any]) -> dict[str, Any]:
    """A query with the task's instruction beside it; one that has its own already, or cannot be had, as it is."""
    if query.get("instruction") or query.get("unreadable"):
        return query
    told = instruction_of(task)
    if isinstance(told, dict):
        told = told["video" if query.get("video") else "image" if query.get("image") else "text"]
    return {**query, "instruction": told}
