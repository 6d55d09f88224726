"""Which function reads which kind of task. Adding a kind is one line here and one function."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlm2vec.evaluation.tasks import Task
from vlm2vec.evaluation.tasks.instructions import bare_task, instructed
from vlm2vec.evaluation.tasks.task_data import TaskData, reworded
from vlm2vec.files import AnyPath
from vlm2vec.inputs import MARKER

LOADERS = {
    "mmeb": ("image", "load_mmeb"),
    "video_labels": ("video", "load_labels"),
    "video_choice": ("video", "load_choice"),
    "video_retrieval": ("video", "load_retrieval"),
    "moments": ("moment", "load_moments"),
    "momentseeker": ("moment", "load_momentseeker"),
    "documents": ("document", "load_documents"),
    "texts": ("texts", "load_texts"),
    "tools": ("tools", "load_tools"),
    "screens": ("screens", "load_screens"),
    "products": ("products", "load_products"),
    "memories": ("memories", "load_memories"),
    "sound_labels": ("sounds", "load_sound_labels"),
    "sound_retrieval": ("sounds", "load_sound_retrieval"),
    "sound_events": ("sound_events", "load_sound_events"),
    "pairs": ("pairs", "load_pairs"),
}
AT_MARKERS = ("screens",)  # loaders whose pictures stand inside of the text, in every published evaluation


# What a task must say for its loader to read it: keys of the task, and keys of its `options`.
NEEDS = {
    "mmeb": ((), ()),
    "video_labels": (("query_prompt",), ("video", "label")),
    "video_choice": (("query_prompt",), ("video", "question", "answer")),
    "video_retrieval": (("query_prompt", "target_prompt"), ("video", "text")),
    "moments": (("query_prompt", "target_prompt"), ("video", "text")),
    "momentseeker": (("query_prompt", "target_prompt"), ("text",)),
    "documents": (("query_prompt", "target_prompt"), ()),
    "texts": (("query_prompt", "target_prompt"), ("queries", "corpus")),
    "tools": (("query_prompt", "target_prompt"), ("queries", "corpus")),
    "screens": (("query_prompt", "target_prompt"), ("queries", "corpus")),
    "products": (("query_prompt", "target_prompt"), ("queries", "corpus")),
    "memories": (("query_prompt", "target_prompt"), ("folder", "instructions")),
    "sound_labels": (("query_prompt", "target_prompt"), ("table", "audio", "label")),
    "sound_retrieval": (("query_prompt", "target_prompt"), ("layout", "queries")),
    "sound_events": (("query_prompt", "target_prompt"), ("folder", "labels")),
    "pairs": ((), ()),
}


def _check(task):
    keys, options = NEEDS[task.loader]
    missing = [key for key in keys if getattr(task, key) is None]
    missing += [f"options.{key}" for key in options if not task.options.get(key)]
    if task.loader == "video_choice" and not (task.options.get("choices") or task.options.get("fixed_choices")):
        missing.append("options.choices or options.fixed_choices")
    if missing:
        raise ValueError(f"task {task.name}: loader {task.loader} needs {', '.join(missing)}")


def check_loader(task: Task) -> None:
    """ValueError for a loader that there is not."""
    if task.loader not in LOADERS:
        raise ValueError(f"task {task.name}: unknown loader {task.loader!r}; known are {', '.join(LOADERS)}")


def bare(item: dict[str, Any]) -> dict[str, Any]:
    """An input as the "wemm" feeding words it: no marker, nothing around the text; a picture or film comes first."""
    return {**item, "text": MARKER.sub("", item["text"]).strip()} if item.get("text") else item


@lru_cache(maxsize=1)
def _temporary() -> TemporaryDirectory:
    return TemporaryDirectory(prefix="vlm2vec-media-")


def temporary() -> str:
    """A folder for unpacked media that goes when the process ends."""
    return _temporary().name


def load_task(task: Task, root: AnyPath | None, media: AnyPath, *, feeding: str = "official", **options: Any) -> TaskData:
    """Read one task into a TaskData.

    Args:
        task: a Task. root: folder of annotation folders (None with hub=True). media: image root, or the folder that
            holds video-tasks/ for videos; a task's own `media` folder below it is looked for first.
        feeding: "official" or "wemm", the two published evaluations of MMEB-V3: words, pools and judgements (`Task.fed`); or "authors",
            MMEB-V2 as Qwen3-VL-Embedding's authors feed it.
        options: hub (bool), protocol ("v1" or "v2"), cache (folder for frames and pages that have to be unpacked; a temporary one of this
            process by default).

    Raises:
        ValueError: names the task and what it lacks; more than half of its rows cannot be scored (fewer are told and counted).
    """
    check_loader(task)
    task = bare_task(task) if feeding == "authors" else task.fed(feeding)
    _check(task)
    if task.media and (Path(media) / task.media).is_dir():
        media = Path(media) / task.media
    options["cache"] = options.get("cache") or temporary()
    module, function = LOADERS[task.loader]
    data = getattr(import_module(f"vlm2vec.evaluation.loaders.{module}"), function)(task, root, media, **options)
    if feeding == "wemm" and task.loader not in AT_MARKERS:
        data.queries, data.candidates = reworded(data.queries, bare), reworded(data.candidates, bare)
    if feeding == "authors" and task.loader != "mmeb":  # whose rows bring their own
        data.queries = [instructed(task, query) for query in data.queries]
    faults = [query["unreadable"] for query in data.queries if query.get("row")]
    if 2 * len(faults) > len(data.queries):
        raise ValueError(f"task {task.name}, {faults[0]}; {len(faults)} of {len(data.queries)} rows cannot be scored: mend or remove them")
    return data
