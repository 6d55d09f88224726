"""Tables of `datasets`: parquet files, folders that `save_to_disk` wrote, data sets of the hub or folders laid out as these.

A row of a parquet file cannot be read without its whole row group: `datasets` lays larger files out as Arrow files once, in its cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm2vec.data.tables.table import Table

logger = logging.getLogger(__name__)

IN_MEMORY = 16 << 20  # bytes of parquet files, decompressed, that are read whole
_TOLD = 1 << 30  # bytes from which on it is said that they are laid out a second time


class ArrowRows:
    """Rows of a `datasets.Dataset`; labels come by their names, media undecoded."""

    def __init__(self, rows: Any):
        import datasets

        self._rows = undecoded(rows)
        self._labels = {name: kind for name, kind in self._rows.features.items() if isinstance(kind, datasets.ClassLabel)}
        self._parts: dict[tuple[str, ...], Any] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int, columns: Sequence[str] | None) -> dict[str, Any]:
        if columns is None:
            values = self._rows[row]
        else:
            names = tuple(name for name in columns if name in self._rows.column_names)
            if names not in self._parts:
                self._parts[names] = self._rows.select_columns(list(names))
            values = self._parts[names][row] if names else {}
        for name, kind in self._labels.items():
            if isinstance(values.get(name), int):
                values[name] = kind.int2str(values[name]) if values[name] >= 0 else None
        return values

    def column(self, name: str) -> list[Any]:
        """The values of a column in all rows."""
        values, kind = self._rows.select_columns([name])[:][name], self._labels.get(name)
        return values if kind is None else [kind.int2str(value) if isinstance(value, int) and value >= 0 else None for value in values]


def undecoded(rows: Any) -> Any:
    """A `datasets.Dataset` whose pictures, films and sounds come as they are stored, in lists too."""
    import datasets

    media = tuple(getattr(datasets, name) for name in ("Image", "Video", "Audio") if hasattr(datasets, name))

    def stored(kind: Any) -> Any:
        if isinstance(kind, media):
            return type(kind)(decode=False)
        if isinstance(kind, datasets.List):
            return datasets.List(stored(kind.feature), length=kind.length)
        if isinstance(kind, dict):
            return {name: stored(inner) for name, inner in kind.items()}
        return kind

    for column, kind in rows.features.items():
        if (plain := stored(kind)) != kind:
            rows = rows.cast_column(column, plain)
    return rows


def mapped(path: str | os.PathLike) -> Any:
    """The `datasets.Dataset` of an Arrow file, which stays on disk."""
    import datasets

    return datasets.Dataset.from_file(os.fspath(path))


def open_parquet(files: Sequence[str]) -> Table:
    """Parquet files of the same columns, in this order."""
    small = _small(files)
    if small is not None:
        return Table(ArrowRows(small), small.column_names, _common(files))
    rows = load("parquet", data_files=list(files), split="train")
    return Table(ArrowRows(rows), rows.column_names, _common(files))


def _small(files: Sequence[str]) -> Any | None:
    """The rows of small files, read whole; None for larger ones."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, tables = 0, []
    for file in files:
        try:
            with pq.ParquetFile(file) as opened:
                about = opened.metadata
                size += sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
                if size > IN_MEMORY:
                    return None
                tables.append(opened.read())
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read as parquet ({_short(error)}); is it a whole parquet file? Copy it again") from error
        if tables[-1].column_names != tables[0].column_names:
            raise ValueError(
                f"{file} has the columns {', '.join(tables[-1].column_names)[:100]}, {files[0]} has "
                f"{', '.join(tables[0].column_names)[:100]}; give files of the same columns"
            )
    try:
        return datasets.concatenate_datasets([datasets.Dataset(table) for table in tables])
    except (ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"{files[0]} cannot be read as parquet ({_short(error)}); give files of the same columns") from error


def open_saved(folder: str, split: str | None) -> Table:
    """A folder that `save_to_disk` wrote, of one table or of several splits."""
    import datasets

    try:
        rows = datasets.load_from_disk(folder)
    except Exception as error:  # a damaged folder raises what pyarrow or json make of it
        raise ValueError(f"{folder} cannot be read as a folder that save_to_disk wrote ({_short(error)}); write it again") from error
    if isinstance(rows, datasets.DatasetDict):
        rows = rows[chosen_split(list(rows), split, folder)]
    elif split is not None:
        raise ValueError(f"{folder} holds one table and no split {split!r}; leave split out")
    return Table(ArrowRows(rows), rows.column_names, os.path.abspath(folder))


def open_hub(name: str, config: str | None, split: str | None) -> Table:
    """A data set of the hub, or a folder that is laid out as one."""
    rows = load(name, *([config] if config else []), split=split or "train")
    return Table(ArrowRows(rows), rows.column_names, os.path.abspath(name) if os.path.isdir(name) else None)


def chosen_split(splits: list[str], split: str | None, where: str) -> str:
    """The split asked for, else "train" or the only one."""
    found = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else None)
    if found not in splits:
        what = f"no split {split!r}" if split else "no split train"
        raise ValueError(f"{where} has {what}; it has {', '.join(splits)}: say split: {splits[0]}")
    return found


def load(*names: str, **options: Any) -> Any:
    """`datasets.load_dataset`, media undecoded. ValueError names the file or data set."""
    import datasets

    files = options.get("data_files")
    if os.path.isdir(names[0]):  # datasets knows a folder by its last name alone: another one of that name, or rows that changed, are its
        stored, size = _as_it_is(names[0])
        options |= {"cache_dir": os.path.join(datasets.config.HF_DATASETS_CACHE, "vlm2vec", stored)}
        announce_copy(names[0], size)
    elif files is not None and "hf://" not in str(files):
        files = [files] if isinstance(files, str) else files
        announce_copy(files[0], sum(os.path.getsize(file) for file in files if os.path.isfile(file)))
    try:
        table = datasets.load_dataset(*names, **options)
    except ImportError:
        raise
    except Exception as error:  # of a damaged file or card it raises what its readers make of it
        if files is not None and "hf://" not in str(files):  # a local file has nothing to do with the network
            first = files[0]
            raise ValueError(
                f"{first} cannot be read as {names[0]} ({_short(error)}); is it one row a line, or a whole parquet file?"
            ) from error
        mend = "is it laid out as a data set of the hub?" if os.path.isdir(names[0]) else "is it there, and is the network?"
        raise ValueError(f"data set {' '.join(names)} cannot be loaded ({_short(error)}); {mend}") from error
    return undecoded(table)


def _as_it_is(folder: str) -> tuple[str, int]:
    """(a name for a folder as it is now, bytes in it): of its place, and of its files' names, sizes and times of their last change."""
    digest, total = hashlib.blake2b(os.path.realpath(folder).encode("utf-8", "surrogateescape"), digest_size=16), 0
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # a link back to where it lies
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(names):
            path = os.path.join(root, name)
            if os.path.isfile(path):
                about = os.stat(path)
                total += about.st_size
                digest.update(repr((os.path.relpath(path, folder), about.st_size, about.st_mtime_ns)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest(), total


def announce_copy(name: str, size: int) -> None:
    """A word before a second copy of so many bytes is made, from 1 GiB on."""
    import datasets

    if size >= _TOLD:
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        there = next((folder for folder in (cache, *cache.parents) if folder.is_dir()), cache)
        free = shutil.disk_usage(there).free
        logger.warning(
            "%s: %.1f GiB are laid out for random access once, a second copy in %s (%.1f GiB free; HF_DATASETS_CACHE names another place)",
            name,
            size / 2**30,
            cache,
            free / 2**30,
        )


def _short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _common(files: Sequence[str]) -> str | None:
    """The folder in which all of the files are."""
    folders = {str(Path(os.path.abspath(file)).parent) for file in files}
    return folders.pop() if len(folders) == 1 else None
