"""What a model cannot do of a benchmark: told as such, and no reason to stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm2vec.evaluation.score.details import v3_facts
from vlm2vec.evaluation.tasks import Task, known_tasks, load_tasks
from vlm2vec.files import AnyPath, write_json
from vlm2vec.inputs import MODALITIES

OF_PUBLISHED = {"image": ("image",), "video": ("video",), "visdoc": ("image",), "gui": ("image",), "audio": ("audio",)}
BESIDE_AUDIO = {"AVE": ("video",), "SpeechCOCO": ("image",)}


def needed(task: Task) -> tuple[str, ...]:
    """What a published task's inputs hold besides text; () for a task of one's own, whose rows tell."""
    return (*OF_PUBLISHED.get(task.modality, ()), *BESIDE_AUDIO.get(task.name, ())) if task.name in known_tasks() else ()


def reason(model: Any, task: Task) -> str | None:
    """Why a model cannot do a task, by its `modalities`; None where it can."""
    taken = getattr(model, "modalities", MODALITIES)
    lacking = [kind for kind in needed(task) if kind not in taken]
    return f"the model takes no {' and no '.join(lacking)}" if lacking else None


def with_unsupported(model: Any, tasks: Sequence[Task], protocol: str) -> list[Task]:
    """The tasks, and for MMEB-V3 also those that the model cannot do: nobody fetches data that a model cannot use."""
    there = {task.name for task in tasks}
    if protocol != "v3":
        return list(tasks)
    return [*tasks, *(task for task in load_tasks("v3").values() if task.name not in there and reason(model, task))]


def unsupported_row(task: Task, why: str, output: AnyPath, options: Any) -> dict[str, Any]:
    """The summary of a task that was not run, also in OUTPUT/tasks/{task}.json: no score, and why."""
    row = {
        "task": task.name,
        "modality": task.modality,
        "group": task.group,
        "meta_task": task.meta_task,
        "split": task.split,
        "metric": task.metric,
        "score": None,
        "unsupported": why,
        "metrics": {},
        "num_queries": 0,
        "num_candidates": 0,
        "candidates_per_query": 0,
        "chance": None,
        "problems": {},
        **v3_facts(options),
    }
    if options.rank == 0:
        write_json(Path(output) / "tasks" / f"{task.name}.json", row, durable=False)
    return row
