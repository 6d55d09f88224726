"""Annotation tables of a task, from a local folder or the hub.

Local: ROOT/{path or name}[/{config}]/{split}*.parquet, or .jsonl, or data/{split}*.parquet as a hub clone has it; the
last part of the hub name serves as folder name too (ROOT/arxivqa_test_subsampled_beir).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlm2vec.data.json_lines import read_json_rows
from vlm2vec.evaluation.tasks.task import Task
from vlm2vec.files import AnyPath
from vlm2vec.files.documents import require_rows

if TYPE_CHECKING:
    from datasets import Dataset


SUFFIXES = (".parquet", ".jsonl")
IN_MEMORY_BYTES = 256 * 2**20


def _folders(root, task, config=None):
    names = [task.path or task.name]
    if task.hub.get("dataset"):
        names.append(task.hub["dataset"].rsplit("/", 1)[-1])
    for name in dict.fromkeys(names):
        base = Path(root) / name
        yield from (base / config, base / config / "data") if config else (base, base / "data")


def _files(root, task, config=None, split=None):
    split = split or task.hub.get("split") or "test"
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


def holds_tables(root: AnyPath, task: Task) -> bool:
    """True when the folder has this task's annotation files."""
    return all(_files(root, task, c) or (c and task.loader != "documents" and _files(root, task)) for c in configs_of(task)[:3])


def _read_files(files):
    """Dataset over local files: small ones in memory, large ones through the library's memory-mapped cache."""
    import pyarrow.parquet
    from datasets import Dataset, concatenate_datasets

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
        table = load_dataset(task.hub["dataset"], config, split=task.hub.get("split", "test"))
    else:
        looked = ", ".join(str(f) for f in _folders(root or Path("."), task, config))
        raise ValueError(f"task {task.name}: no {task.hub.get('split') or 'test'}*.parquet or .jsonl in {looked}")
    for column in columns:
        if column not in table.column_names:
            raise ValueError(f"{source}: no column {column!r}; it has {', '.join(table.column_names)}")
    if len(table) == 0:
        raise ValueError(f"{source} has no rows")
    return table
