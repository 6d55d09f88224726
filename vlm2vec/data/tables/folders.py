"""What a folder holds: a saved table, pictures with their metadata, pictures by class, shards, or a data set laid out as the hub's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm2vec.data.tables.arrow import chosen_split
from vlm2vec.data.tables.table import Table, nearest
from vlm2vec.media.endings import PICTURES
from vlm2vec.media.sampling import natural_order

METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")


def metadata_of(folder: str, split: str | None) -> str | None:
    """The file that describes the pictures of a folder, as `datasets`' ImageFolder takes it; in a folder a split, the split's."""
    own = [name for name in METADATA if os.path.isfile(os.path.join(folder, name))]
    if len(own) > 1:
        raise ValueError(f"{folder} holds {' and '.join(own)}; expected one of them: name it as path")
    if own:
        if split is not None:
            raise ValueError(f"{folder}: its {own[0]} knows no splits; leave split out")
        return os.path.join(folder, own[0])
    splits = sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and any((p / name).is_file() for name in METADATA))
    if not splits:
        return None
    return metadata_of(os.path.join(folder, chosen_split(splits, split, folder)), None)


@dataclass
class Renamed:
    """A reader some of whose columns have other names, {name: the reader's own}."""

    reader: Any
    names: dict[str, str]

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, row: int, columns: Sequence[str] | None) -> dict[str, Any]:
        own = None if columns is None else [self.names.get(column, column) for column in columns]
        values = self.reader.read(row, own)
        return values | {name: values.get(column) for name, column in self.names.items()}


def with_pictures(table: Table, path: str) -> Table:
    """A metadata table with ImageFolder's columns: `image` for `file_name`, `X` for `X_file_name`, beside its own.

    Raises:
        ValueError: no column of file names.
    """
    names = {}
    for column in table.column_names:
        for ending in ("file_names", "file_name"):
            if column == ending or column.endswith("_" + ending):
                plural = "s" if ending == "file_names" else ""
                name = column.removesuffix(ending).removesuffix("_") or "image"
                names[name + plural] = column
                break
    if not names:
        raise ValueError(f"{path}: expected a column file_name with the names of the pictures, {nearest('file_name', table.column_names)}")
    names = {name: column for name, column in names.items() if name not in table.column_names}
    return replace(table, reader=Renamed(table.reader, names), column_names=[*names, *table.column_names])


class PicturesByClass:
    """Pictures of a folder, `label` being the folder that each lies in."""

    def __init__(self, files: list[str]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, row: int, columns: Sequence[str] | None) -> dict[str, Any]:
        file = self._files[row]
        return {"image": file, "label": os.path.basename(os.path.dirname(file))}


def pictures_by_class(folder: str) -> Table | None:
    """The pictures in the folders of a folder, in natural order; None where there are none."""
    found = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names if name.lower().endswith(PICTURES)]
    inside = [file for file in found if os.path.dirname(file) != folder]
    files = sorted(inside, key=lambda file: (os.path.dirname(file), natural_order(file)))
    return Table(PicturesByClass(files), ["image", "label"], folder) if files else None
