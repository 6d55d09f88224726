"""Annotation tables of a task, from a local folder or the hub.

Local: ROOT/{path or name}[/{config}]/{split}*.parquet, or .jsonl, or data/{split}*.parquet as a hub clone has it; the
last part of the hub name serves as folder name too (ROOT/arxivqa_test_subsampled_beir). A path may be a file of JSON lines itself,
and a folder may hold {config}.json or .jsonl (MMEB-V3's videos).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm2vec.data.json_lines import read_json_rows
from vlm2vec.evaluation.loaders.rows import IN_MEMORY_BYTES, find_files, read_rows
from vlm2vec.evaluation.tasks.task import Task
from vlm2vec.files import AnyPath
from vlm2vec.files.documents import require_rows

if TYPE_CHECKING:
    from datasets import Dataset


SUFFIXES = (".parquet", ".jsonl")
SINGLE = (".jsonl", ".json")  # of a table that is one file, named for itself


FIXED = "-fixed"  # ends the names of data sets whose labels were mended


def _bases(root, task):
    """Where a task's tables may lie; a set whose labels were mended goes before the one that it replaces."""
    names = list(dict.fromkeys(name for name in (task.path, task.name) if name))
    if task.hub.get("dataset"):
        last = task.hub["dataset"].rsplit("/", 1)[-1]
        beside = [str(Path(task.path).parent / last)] if task.path else []
        names = [*beside, last, *names] if last.endswith(FIXED) else [*names, *beside, last]
    return [Path(root) / name for name in dict.fromkeys(names)]


def _folders(root, task, config=None):
    for base in _bases(root, task):
        yield from (base / config, base / config / "data") if config else (base, base / "data")


def has_config(root: AnyPath, task: Task, config: str) -> bool:
    """Whether a task's folder holds a sub-table, as a folder or as a file of its own."""
    files = [base / f"{config}{ending}" for base in _bases(root, task) for ending in SINGLE]
    return any(path.is_file() for path in files) or any(folder.is_dir() for folder in _folders(root, task, config))


def unmended(root: AnyPath | None, task: Task) -> str | None:
    """The folder from which a task is read whose published labels were wrong and have been mended since, None where that is not known."""
    wanted = task.hub.get("dataset", "").rsplit("/", 1)[-1]
    files = _files(root, task, configs_of(task)[0]) if root is not None and wanted.endswith(FIXED) else []
    used = next((base for base in _bases(root, task) if files and base in files[0].parents), None) if files else None
    return None if used is None or used.name.endswith(FIXED) else str(used)


def _files(root, task, config=None, split=None):
    split = split or task.hub.get("split") or "test"
    for base in _bases(root, task):
        named = [base / f"{config}{ending}" for ending in SINGLE] if config else [base]
        found = [path for path in named if path.suffix in SINGLE and path.is_file()]
        if found:
            return found
    for folder in _folders(root, task, config):
        if not folder.is_dir():
            continue
        for stem in (split, "test"):
            for suffix in SUFFIXES:
                files = sorted(folder.glob(f"{stem}*{suffix}"))
                if files:
                    return files
    return []


def configs_of(task: Task) -> list[str | None]:
    """Names of the sub-tables of a task: one (None), the three of a document set, or MVBench's twenty."""
    if task.loader == "documents":
        return ["queries", "corpus", "qrels"]
    config = task.hub.get("config")
    return list(config) if isinstance(config, list) else [config]


PATHS = ("queries", "corpus", "qrels", "table", "instructions")  # options that name files below the data folder


def holds_tables(root: AnyPath, task: Task) -> bool:
    """True when the folder has this task's annotation files."""
    named = [task.options[key] for key in PATHS if key in task.options]
    if named or "folder" in task.options:
        folder, brace, _ = task.options.get("folder", "").partition("{")
        folder = str(Path(folder).parent) if brace else folder  # columns fill the rest in
        return all(find_files(root, patterns) for patterns in named) and (Path(root) / folder).is_dir()
    if task.loader == "documents" and languages_of(root, task):
        return True
    return all(_files(root, task, c) or (c and task.loader != "documents" and _files(root, task)) for c in configs_of(task)[:3])


def languages_of(root: AnyPath | None, task: Task) -> list[str]:
    """Languages of a folder in mteb's layout, which holds {language}-queries, {language}-corpus and {language}-qrels; [] for others."""
    for base in _bases(root, task) if root is not None else []:
        found = sorted(folder.name.removesuffix("-queries") for folder in base.glob("*-queries") if folder.is_dir())
        if found:
            return found
    return []


def _read_files(files):
    """Dataset over local files: small ones in memory, large ones through the library's memory-mapped cache."""
    import pyarrow.parquet
    from datasets import Dataset, concatenate_datasets

    if files[0].suffix == ".json":
        return concatenate_datasets([Dataset.from_list(list(read_rows([f]))) for f in files])
    if files[0].suffix == ".jsonl":
        for file in files:
            require_rows(file)
        return concatenate_datasets([Dataset.from_dict(read_json_rows(f)) for f in files])
    if sum(f.stat().st_size for f in files) > IN_MEMORY_BYTES:
        return Dataset.from_parquet([str(f) for f in files])
    # named by its file: the library would pickle the table's description to find it a name
    parts = [Dataset(pyarrow.parquet.read_table(f), fingerprint=hashlib.blake2b(str(f).encode(), digest_size=8).hexdigest()) for f in files]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def read_table(root: AnyPath | None, task: Task, config: str | None = None, *, columns: Sequence[str] = (), hub: bool = False) -> Dataset:
    """One annotation table as a datasets.Dataset.

    Args:
        root: data folder, or None together with hub=True.
        config: sub-table, or None.
        columns: names that must be there.
        hub: read from the hub (the task's `hub` entry) when the folder does not hold it.

    Raises: ValueError naming the file and the column that is missing, or where the table was looked for.
    """
    from datasets import load_dataset

    files = _files(root, task, config) if root is not None else []
    if not files and root is not None and config and task.loader != "documents":
        files = _files(root, task)
    if files:
        source = str(files[0])
        try:
            table = _read_files(files)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors or OSErrors
            told = (str(error).splitlines() or [type(error).__name__])[0][:250]
            raise ValueError(told if source in told and files[0].suffix == ".jsonl" else f"{source} cannot be read: {told}") from error
    elif hub and task.hub.get("dataset"):
        source = f"hub dataset {task.hub['dataset']}"
        if task.hub.get("access") == "private":
            raise ValueError(f"task {task.name}: expected its folder in the data folder, since {source} is private; got none")
        pinned = {"revision": task.hub["revision"]} if task.hub.get("revision") else {}
        table = load_dataset(task.hub["dataset"], config, split=task.hub.get("split", "test"), **pinned)
    else:
        looked = ", ".join(str(f) for f in _folders(root or Path("."), task, config))
        raise ValueError(f"task {task.name}: no {task.hub.get('split') or 'test'}*.parquet or .jsonl in {looked}")
    for column in columns:
        if column not in table.column_names:
            raise ValueError(f"{source}: no column {column!r}; it has {', '.join(table.column_names)}")
    if len(table) == 0:
        raise ValueError(f"{source} has no rows")
    return table
