"""Tables of people's own: one way to open every kind, a row at a time, without bringing it into another form first.

CSV, TSV        pyarrow; cells are texts as they stand                                            csv_files
JSON, JSONL     by lines, or one list                                                             json_files
parquet, a folder that save_to_disk wrote, a data set of the hub, a folder laid out as one        arrow
tar             WebDataset's shards                                                               shards
folders         pictures with metadata.csv (.jsonl, .parquet), or in folders of their classes     folders
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from vlm2vec.data.tables.arrow import open_hub, open_parquet, open_saved
from vlm2vec.data.tables.csv_files import open_csv
from vlm2vec.data.tables.folders import metadata_of, pictures_by_class, with_pictures
from vlm2vec.data.tables.json_files import open_json
from vlm2vec.data.tables.shards import Joined, open_shards
from vlm2vec.data.tables.table import Table, nearest
from vlm2vec.files.documents import require_regular
from vlm2vec.media.sampling import natural_order

__all__ = ["ENDINGS", "Table", "is_local", "nearest", "open_table"]

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".tar")
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_table(
    path: str,
    *,
    split: str | None = None,
    config: str | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    wanted: Sequence[str] = (),
) -> Table:
    """Rows of a file, of several (`shards/*.tar`, `part-{000..012}.parquet`), of a folder, or of a data set of the hub.

    Args:
        split: of a data set that has several; "train" by default. config: its configuration.
        encoding, delimiter: of CSV files, where they are not told by the file.
        wanted: columns that will be asked for, by which a CSV's separator is found.

    Returns:
        A `Table`; nothing of a picture or film is read.

    Raises:
        ValueError: names the file or data set, and what is wrong with it.
    """
    files = _files(path)
    if files:
        for key, value in (("split", split), ("config", config)):
            if value is not None:
                raise ValueError(f"{path} is a file and has no {key}; leave {key}: {value} out")
        return _one_kind(path, files, encoding, delimiter, wanted)
    if os.path.isdir(path):
        return _folder(os.path.abspath(path), split, config, encoding, delimiter, wanted)
    if not _HUB.fullmatch(path) or path.lower().endswith(ENDINGS) or path.startswith("."):
        raise ValueError(f"no such file or folder as {path} (in {os.getcwd()}); mend path, or name a data set of the hub")
    return open_hub(path, config, split)


def is_local(path: str) -> bool:
    """Whether the rows lie on this machine."""
    return os.path.isdir(path) or bool(_files(path))


def _files(path: str) -> list[str]:
    """The files that a path stands for, in natural order; [] for none."""
    if os.path.lexists(path) and not os.path.isdir(path):
        return [path]
    if not re.search(r"[*?\[]|\{\d+\.\.\d+\}", path):
        return []
    named = [path]
    while any(_BRACES.search(one) for one in named):
        named = [spread for one in named for spread in _spread(one)]
    for one in named:
        if one != path and not glob.has_magic(one) and not os.path.isfile(one):
            raise ValueError(f"{path}: there is no {one}; mend the numbers, or copy the shard")
    found = [file for one in named for file in (glob.glob(one, recursive=True) if glob.has_magic(one) else [one])]
    return sorted((file for file in found if os.path.isfile(file)), key=lambda file: (os.path.dirname(file), natural_order(file)))


def _spread(path: str) -> list[str]:
    found = _BRACES.search(path)
    if found is None:
        return [path]
    first, last = found.groups()
    return [f"{path[: found.start()]}{number:0{len(first)}}{path[found.end() :]}" for number in range(int(first), int(last) + 1)]


def _one_kind(path: str, files: list[str], encoding: str | None, delimiter: str | None, wanted: Sequence[str]) -> Table:
    endings = {Path(file).suffix.lower() for file in files}
    if len(endings) > 1 or not endings <= set(ENDINGS):
        raise ValueError(f"{path}: expected files of one ending of {', '.join(ENDINGS)}, got {', '.join(sorted(endings)) or 'none'}")
    (ending,) = endings
    for file in files:
        require_regular(file)
    if ending in (".csv", ".tsv"):
        tables = [open_csv(file, encoding=encoding, delimiter=delimiter, wanted=wanted) for file in files]
    elif encoding is not None or delimiter is not None:
        raise ValueError(f"{path}: encoding and delimiter are of CSV files, this is {ending}; leave them out")
    elif ending == ".parquet":
        return open_parquet(files)
    elif ending == ".tar":
        return open_shards(files)
    else:
        tables = [open_json(file) for file in files]
    return tables[0] if len(tables) == 1 else _joined(files, tables)


def _joined(files: list[str], tables: list[Table]) -> Table:
    first = tables[0]
    is_json = not files[0].lower().endswith((".csv", ".tsv"))  # whose keys are each row's own
    for file, table in zip(files, tables):
        absent = [name for name in first.column_names if name not in table.column_names]
        if absent and not is_json:
            raise ValueError(f"{file} has no column {absent[0]!r}, which {files[0]} has; give files of the same columns")
    media = first.media if len({table.media for table in tables}) == 1 else None
    left_out = tuple(line for table in tables for line in table.left_out)
    repeated = frozenset().union(*(table.repeated for table in tables))
    names = list(dict.fromkeys(name for table in tables for name in table.column_names)) if is_json else first.column_names
    joined = Table(Joined([table.reader for table in tables]), names, media, left_out, repeated)
    return replace(joined, late=partial(_any, [table.late for table in tables if table.late is not None])) if is_json else joined


def _any(looks: Sequence[Callable[[str], bool]], name: str) -> bool:
    return any(look(name) for look in looks)


def _folder(path: str, split: str | None, config: str | None, encoding: str | None, delimiter: str | None, wanted: Sequence[str]) -> Table:
    if os.path.isfile(os.path.join(path, "dataset_dict.json")) or os.path.isfile(os.path.join(path, "dataset_info.json")):
        return open_saved(path, split)
    metadata = metadata_of(path, split)
    if metadata is not None:
        return with_pictures(_one_kind(metadata, [metadata], encoding, delimiter, wanted), metadata)
    shards = _files(os.path.join(glob.escape(path), "*.tar"))
    if shards:
        return _one_kind(path, shards, encoding, delimiter, wanted)
    if any(Path(path).rglob("*.parquet")) or any(Path(path).rglob("*.arrow")):
        return open_hub(path, config, split)
    tables = sorted(name for name in os.listdir(path) if name.lower().endswith(ENDINGS))
    if tables:
        raise ValueError(f"{path} is a folder with {', '.join(tables[:4])}; name the file: path: {os.path.join(path, tables[0])}")
    pictures = pictures_by_class(path)
    if pictures is None:
        raise ValueError(f"{path}: no table in this folder; expected {', '.join(ENDINGS)}, metadata.csv beside pictures, or a data set")
    return pictures
