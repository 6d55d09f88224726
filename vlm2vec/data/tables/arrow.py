"""Tables of `datasets`: parquet files, folders that `save_to_disk` wrote, data sets of the hub or folders laid out as these."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm2vec.data.tables.table import Table


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
    rows = load("parquet", data_files=list(files), split="train")
    return Table(ArrowRows(rows), rows.column_names, _common(files))


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

    try:
        table = datasets.load_dataset(*names, **options)
    except ImportError:
        raise
    except Exception as error:  # of a damaged file or card it raises what its readers make of it
        files = options.get("data_files")
        if files is not None and "hf://" not in str(files):  # a local file has nothing to do with the network
            first = files if isinstance(files, str) else files[0]
            raise ValueError(
                f"{first} cannot be read as {names[0]} ({_short(error)}); is it one row a line, or a whole parquet file?"
            ) from error
        mend = "is it laid out as a data set of the hub?" if os.path.isdir(names[0]) else "is it there, and is the network?"
        raise ValueError(f"data set {' '.join(names)} cannot be loaded ({_short(error)}); {mend}") from error
    return undecoded(table)


def _short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _common(files: Sequence[str]) -> str | None:
    """The folder in which all of the files are."""
    folders = {str(Path(os.path.abspath(file)).parent) for file in files}
    return folders.pop() if len(folders) == 1 else None
