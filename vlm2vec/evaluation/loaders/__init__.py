"""Which function reads which kind of task. Adding a kind is one line here and one function."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vlm2vec.evaluation.tasks import Task
from vlm2vec.evaluation.tasks.task_data import TaskData
from vlm2vec.files import AnyPath

LOADERS = {
    "pairs": ("pairs", "load_pairs"),
    "mmeb": ("image", "load_mmeb"),
    "video_labels": ("video", "load_labels"),
    "video_choice": ("video", "load_choice"),
    "video_retrieval": ("video", "load_retrieval"),
    "moments": ("moment", "load_moments"),
    "momentseeker": ("moment", "load_momentseeker"),
    "documents": ("document", "load_documents"),
}


# What a task must say for its loader to read it: keys of the task, and keys of its `options`.
NEEDS = {
    "pairs": ((), ()),
    "mmeb": ((), ()),
    "video_labels": (("query_prompt",), ("video", "label")),
    "video_choice": (("query_prompt",), ("video", "question", "answer")),
    "video_retrieval": (("query_prompt", "target_prompt"), ("video", "text")),
    "moments": (("query_prompt", "target_prompt"), ("video", "text")),
    "momentseeker": (("query_prompt", "target_prompt"), ("text",)),
    "documents": (("query_prompt", "target_prompt"), ()),
}


def _check(task):
    keys, options = NEEDS[task.loader]
    missing = [key for key in keys if not getattr(task, key)]
    missing += [f"options.{key}" for key in options if not task.options.get(key)]
    if task.loader == "video_choice" and not (task.options.get("choices") or task.options.get("fixed_choices")):
        missing.append("options.choices or options.fixed_choices")
    if missing:
        raise ValueError(f"task {task.name}: loader {task.loader} needs {', '.join(missing)}")


def check_loader(task: Task) -> None:
    """ValueError for a loader that there is not."""
    if task.loader not in LOADERS:
        raise ValueError(f"task {task.name}: unknown loader {task.loader!r}; known are {', '.join(LOADERS)}")


def load_task(task: Task, root: AnyPath | None, media: AnyPath, **options: Any) -> TaskData:
    """Read one task into a TaskData.

    Args:
        task: a Task. root: folder of annotation folders (None with hub=True). media: image root, or the folder that
            holds video-tasks/ for videos.
        options: hub (bool), protocol ("v1" or "v2"), cache (folder for frames and pages that have to be unpacked).

    Raises:
        ValueError: names the task and what it lacks; more than half of its rows cannot be scored (fewer are told and counted).
    """
    check_loader(task)
    _check(task)
    module, function = LOADERS[task.loader]
    data = getattr(import_module(f"vlm2vec.evaluation.loaders.{module}"), function)(task, root, media, **options)
    faults = [query["unreadable"] for query in data.queries if query.get("row")]
    if 2 * len(faults) > len(data.queries):
        raise ValueError(f"task {task.name}, {faults[0]}; {len(faults)} of {len(data.queries)} rows cannot be scored: mend or remove them")
    return data
