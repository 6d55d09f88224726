"""What a model cannot do of a benchmark: told as such, and no reason to stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm2vec.evaluation.score.details import v3_facts
from vlm2vec.evaluation.tasks import Task, load_tasks
from vlm2vec.files import AnyPath, write_json

NO_AUDIO = "the model takes no audio"


def hears(model: Any) -> bool:
    """Whether a model takes audio: it says so in `modalities`."""
    return "audio" in getattr(model, "modalities", ())


def audio_tasks(model: Any, tasks: Sequence[Task]) -> dict[str, Task]:
    """{name: task} of the tasks that a model cannot do since it hears nothing; {} for one that hears."""
    return {} if hears(model) else {task.name: task for task in tasks if task.modality == "audio"}


def with_unheard(model: Any, tasks: Sequence[Task], protocol: str) -> list[Task]:
    """The tasks, and for MMEB-V3 and a model without audio its audio tasks too: nobody fetches data that a model cannot use."""
    there = {task.name for task in tasks}
    if protocol != "v3" or hears(model):
        return list(tasks)
    return [*tasks, *(task for task in load_tasks("v3").values() if task.modality == "audio" and task.name not in there)]


def unsupported_row(task: Task, output: AnyPath, options: Any) -> dict[str, Any]:
    """The summary of a task that was not run, also in OUTPUT/tasks/{task}.json: no score, and why."""
    row = {
        "task": task.name,
        "modality": task.modality,
        "group": task.group,
        "meta_task": task.meta_task,
        "split": task.split,
        "metric": task.metric,
        "score": None,
        "unsupported": NO_AUDIO,
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
