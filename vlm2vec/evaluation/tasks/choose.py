"""Which tasks a run takes: by name, group, kind or modality, from a folder, from files of one's own, or from the hub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlm2vec.evaluation.tasks import Task, find_tasks, known_tasks, load_tasks, read_task_file
from vlm2vec.files import AnyPath


def chosen_tasks(words: Iterable[str], data: AnyPath | None, *, hub: bool = False, protocol: str = "v1") -> list[Task]:
    """The tasks of `--tasks WORD...`.

    Args:
        words: names, groups, kinds, modalities or sets of tasks, and YAML files with tasks of one's own; none takes all there are.
        data: the annotation folder. hub: tasks that the folder lacks are read from the hub. protocol: "v1", "v2" or "v3".

    Raises: ValueError for a word that nothing is named by.
    """
    extra: dict[str, Task] = {}
    names: list[str] = []
    for word in words:
        if word.endswith((".yaml", ".yml")):
            own = read_task_file(word)
            extra |= own
            names += list(own)
        else:
            names.append(word)
    if data and not hub:
        return find_tasks(data, names or None, extra, protocol=protocol)
    local = {}
    if data:
        try:
            local = {task.name: task for task in find_tasks(data, None, extra, protocol=protocol)}
        except ValueError:
            pass
    published = load_tasks(protocol)
    if protocol == "v3":  # what only its archives hold cannot be had from the hub set by set
        published = {name: task for name, task in published.items() if name in load_tasks()}
    apart = {task.name: task for task in known_tasks().values() if task.group == "vidore_v3" and task.hub.get("access") != "private"}
    # by a word of their own alone: they are no part of MMEB, and "visdoc" means its pages
    apart = {name: task for name, task in apart.items() if {name, task.group, task.hub_name} & set(names)}
    return _named({**published, **apart, **extra, **local}, names)


def _named(table: dict[str, Task], names: Sequence[str]) -> list[Task]:
    """Those of a table that the names mean, all of it without names. Raises: ValueError where nothing is."""
    tasks = [task for task in table.values() if not names or any(task.is_called(name) for name in names)]
    if not tasks:
        raise ValueError(f"no task, group or modality named {', '.join(names)}; see vlm2vec eval --list")
    return tasks
