"""The task table: MMEB's 36 image tasks, MMEB-V2's 42 more, MMEB-V3's 112 more, ViDoRe V3, and tasks of your own, all as data.

A task of your own is a folder in one of the known layouts, or a few lines of YAML (`--tasks FILE.yaml`):

    tasks:
      - name: Products
        loader: mmeb            # a folder ROOT/Products/test-00000.parquet with MMEB's columns
        group: image_ret
        meta_task: retrieval
        metric: hit@5
        query_prompt: "<|image_1|>\\nFind a photo of the same product: {text}\\n"     # optional: left out, rows hold theirs
        target_prompt: "<|image_1|>\\nRepresent the given image.\\n"                    # likewise

`options` names the columns that the video loaders read (see tasks.yaml for each); a folder with queries, corpus and qrels is a
document task without any YAML.

In a data folder, `tasks.json` or `tasks.yaml` may name the meta-task of each dataset: {"Products": "retrieval"} or
{"Products": {"meta_task": "retrieval", "split": "ood", "metric": "hit@5"}}.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm2vec.evaluation.tasks.task import GROUP_OF_META, GROUPS, META_OF_GROUP, TASK_MODALITIES, V2_GROUPS, Task, make_task
from vlm2vec.files import AnyPath
from vlm2vec.files.documents import kind, parse_json, read_text, read_yaml, shown

__all__ = [
    "GROUPS",
    "GROUP_OF_META",
    "META_OF_GROUP",
    "TASK_MODALITIES",
    "Task",
    "V2_GROUPS",
    "custom_task",
    "find_tasks",
    "known_tasks",
    "label_sets",
    "load_tasks",
    "make_task",
    "published",
    "read_hints",
    "read_task_file",
]
HERE = Path(__file__).resolve().parent


def _read_yaml(path):
    if not Path(path).exists():
        raise ValueError(f"no task file {path}")
    return read_yaml(path)


def read_task_file(path: AnyPath) -> dict[str, Task]:
    """{name: Task} of a YAML file with a `tasks:` list; keys under `defaults:` hold for those that do not say otherwise."""
    content = _read_yaml(path)
    rows = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list under the key tasks")
    defaults = content.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise ValueError(f"{path}: defaults should be a mapping of task keys, got {kind(defaults)}")
    tasks = {}
    for row in rows:
        task = make_task({**defaults, **row} if isinstance(row, dict) else row, str(path))
        if task.name in tasks:
            raise ValueError(f"{path}: two tasks are named {task.name!r}")
        tasks[task.name] = task
    return tasks


@lru_cache(maxsize=2)
def load_tasks(protocol: str = "v2") -> dict[str, Task]:
    """The published tasks of a benchmark as {name: Task}, in the order of the papers. Do not change the dict.

    Args:
        protocol: "v1" or "v2", the 78 of MMEB-V2 (of which 36 are MMEB's); "v3", the 190 of MMEB-V3, the 78 among them with their places
            in its folder.
    """
    if protocol != "v3":
        return read_task_file(HERE / "tasks.yaml")
    content = _read_yaml(HERE / "v3" / "changes.yaml")
    changes = {row["name"]: row for row in content["tasks"]}
    tasks = {}
    for name, task in load_tasks().items():
        change = {**content.get(task.modality, {}), **changes[name]}
        tasks[name] = replace(task, **{**change, "options": {**task.options, **change.get("options", {})}})
        if name == "Visual7W-Pointing":  # MCMR is counted among the images, after MMEB's
            agent = read_task_file(HERE / "v3" / "agent.yaml")
            tasks["MCMR"] = agent.pop("MCMR")
    for part in ("text", "tool"):
        tasks |= read_task_file(HERE / "v3" / f"{part}.yaml")
    return {**tasks, **agent, **read_task_file(HERE / "v3" / "audio.yaml")}


@lru_cache(maxsize=1)
def known_tasks() -> dict[str, Task]:
    """Every published task: MMEB-V3's 190, which hold those of MMEB and MMEB-V2, and ViDoRe V3's ten."""
    return {**load_tasks("v3"), **read_task_file(HERE / "v3" / "vidore.yaml")}


@lru_cache(maxsize=1)
def label_sets() -> dict[str, list[str]]:
    """{name: [labels]} of the video classification tasks."""
    return _read_yaml(HERE / "labels.yaml")


@lru_cache(maxsize=1)
def published() -> dict[str, Any]:
    """Published scores in percent: {"tables": .., "columns": .., "models": {task: {column: score}}}."""
    return _read_yaml(HERE / "published.yaml")


def read_hints(root: AnyPath) -> dict[str, dict[str, Any]]:
    """{dataset: {task keys}} from ROOT/tasks.json or ROOT/tasks.yaml; {} when there is neither."""
    for name in ("tasks.json", "tasks.yaml", "tasks.yml"):
        path = Path(root) / name
        if not path.is_file():
            continue
        if name.endswith("json"):
            content = parse_json(read_text(path), str(path))
        else:
            content = _read_yaml(path)
        if isinstance(content, dict) and isinstance(content.get("tasks"), (dict, list)):
            content = content["tasks"]
        if isinstance(content, list):
            for at, row in enumerate(content):
                if not isinstance(row, dict) or "name" not in row:
                    raise ValueError(f"{path}: entry {at} of the list should be a mapping with a name, got {shown(row)}")
            content = {str(row["name"]): {k: v for k, v in row.items() if k != "name"} for row in content}
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected a mapping of dataset names, got {kind(content)}")
        for name, hint in content.items():
            if not isinstance(hint, (str, dict, type(None))):
                raise ValueError(f"{path}: {shown(name)} should be a meta-task or a mapping, got {kind(hint)}")
        return {str(k): {"meta_task": v} if isinstance(v, str) else dict(v or {}) for k, v in content.items()}
    return {}


def _usable(hint):
    """The keys of a hint that describe a task; a benchmark's file may hold much else (counts, chance levels, notes)."""
    usable = {k: hint[k] for k in ("meta_task", "group", "metric", "modality", "loader", "query_prompt") if hint.get(k)}
    if hint.get("split") in ("ind", "ood"):
        usable["split"] = hint["split"]
    if hint.get("candidates") in ("local", "global"):
        usable["candidates"] = hint["candidates"]
    return usable


def custom_task(name: str, hint: dict[str, Any] | None = None, documents: bool = False) -> Task:
    """A task for a folder that the table does not know; `documents` for one with queries, corpus and qrels, prompted as ViDoRe is."""
    like = {}
    if documents:
        model = load_tasks()["ViDoRe_arxivqa"]
        like = {key: getattr(model, key) for key in ("modality", "loader", "metric", "candidates", "query_prompt", "target_prompt")}
    return make_task({"name": name, **like, **_usable(hint or {})}, f"dataset {name!r}")


def find_tasks(root: AnyPath, names: Iterable[str] | None = None, extra: dict[str, Task] | None = None, protocol: str = "v2") -> list[Task]:
    """The tasks a data folder holds.

    Args:
        root: folder with one sub-folder per dataset (tests: test-*.parquet; documents: queries/corpus/qrels).
        names: task, group, meta-task or modality names to keep, or None for all that are there.
        extra: {name: Task} of one's own, which win over the published table.
        protocol: "v3" looks for MMEB-V3's tasks in its folder's layout, others for MMEB's and MMEB-V2's; ViDoRe V3's are found by any.

    Returns: list of Tasks in the table's order, own tasks last. Raises ValueError for a name that matches nothing.
    """
    from vlm2vec.evaluation.loaders.tables import holds_tables

    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"no data folder {root}; expected a folder with one sub-folder per dataset")
    table = {**load_tasks(protocol), **{name: task for name, task in known_tasks().items() if task.group == "vidore_v3"}, **(extra or {})}
    hints = read_hints(root)
    tasks = []
    for task in table.values():
        if holds_tables(root, task):
            hint = _usable(hints.get(task.name, {}))
            tasks.append(replace(task, **hint) if hint else task)
    taken = {task.path or task.name for task in tasks} | {task.name for task in tasks}
    taken |= {task.hub["dataset"].rsplit("/", 1)[-1] for task in tasks if task.hub.get("dataset")}
    order = {name: i for i, name in enumerate(hints)}
    folders = [p for p in root.iterdir() if p.is_dir() and p.name not in taken]
    for folder in sorted(folders, key=lambda p: (order.get(p.name, len(order)), p.name)):
        task = custom_task(folder.name, hints.get(folder.name), documents=(folder / "corpus").is_dir() and (folder / "qrels").is_dir())
        if holds_tables(root, task):
            tasks.append(task)
    if names:
        wanted, all_tasks = list(names), tasks
        tasks = [t for t in tasks if any(t.is_called(n) for n in wanted)]
        missing = [n for n in wanted if not any(t.is_called(n) for t in all_tasks)]
        if missing:
            all_names = ", ".join(t.name for t in all_tasks) or "nothing"
            raise ValueError(f"no task, group or modality {', '.join(missing)} in {root}; it holds {all_names}")
    if not tasks:
        raise ValueError(f"{root} holds no dataset; expected e.g. {root}/ImageNet-1K/test-00000.parquet")
    return tasks
