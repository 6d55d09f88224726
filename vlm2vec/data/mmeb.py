"""MMEB's own files on disk: read, validate, write.

    train   ROOT/{dataset}/original-00000.parquet   qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path
    eval    ROOT/{dataset}/test-00000.parquet       qry_text, qry_img_path, tgt_text, tgt_img_path (parallel lists)

The positive is candidate 0. An absent side is the empty string, never null. Image paths are relative to an image folder
that is named apart. Shards are read in the order of their names, so the hub's `test-00000-of-00001.parquet` is read too.

Source: the released TIGER-Lab/MMEB-train and MMEB-eval.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from vlm2vec.files import AnyPath, write_table
from vlm2vec.inputs import IMAGE_MARKER

if TYPE_CHECKING:
    from datasets import Dataset


TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")
EVAL_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")

_OPTIONAL = frozenset({"neg_text", "neg_image_path"})  # some sources were released without negatives
_REQUIRED = frozenset(TRAIN_COLUMNS) - _OPTIONAL
_LISTS = frozenset({"tgt_text", "tgt_img_path"})


def read_train(
    root: AnyPath, name: str, *, image_root: AnyPath | None = None, split: str = "original", more: Sequence[str] = ()
) -> Dataset:
    """Training rows of one dataset, checked.

    Args:
        root: folder that holds one folder per dataset.
        name: dataset, i.e. its folder.
        image_root: where given, every image path must be a file below it.
        split: `original` or `diverse_instruction`, the two wordings MMEB was released with.
        more: other columns to keep as they are, such as a teacher's scores; one that is not there is left out.

    Returns:
        `datasets.Dataset` with TRAIN_COLUMNS, every value a string (of the negative columns a list of strings where the file has
        lists); missing negative columns come back as "".

    Raises:
        ValueError: no such dataset, an unreadable file, a missing column, an empty query, a row without its positive, a
            null, or an image path that leaves the image folder; names file, row and column, and the mend.
    """
    table, files = _load(root, name, split, TRAIN_COLUMNS, more)
    _check_pairs(table, files, "qry", "qry_image_path", "has no query: both are empty")
    _check_pairs(table, files, "pos_text", "pos_image_path", "has no positive: both are empty")
    paths = [(column, table[column].to_pylist()) for column in TRAIN_COLUMNS if column.endswith("image_path")]
    _check_paths(paths, files, image_root)
    return _dataset(table)


def read_eval(root: AnyPath, name: str, *, image_root: AnyPath | None = None, split: str = "test") -> Dataset:
    """Evaluation rows of one dataset, checked as in `read_train`.

    Returns:
        `datasets.Dataset` with EVAL_COLUMNS; `tgt_text` and `tgt_img_path` are lists of equal length, the positive first.
    """
    table, files = _load(root, name, split, EVAL_COLUMNS)
    _check_pairs(table, files, "qry_text", "qry_img_path", "has no query: both are empty")
    texts, images = table["tgt_text"].to_pylist(), table["tgt_img_path"].to_pylist()
    for row, (text, image) in enumerate(zip(texts, images)):
        where = f"{_place(files, row)}, columns 'tgt_text' and 'tgt_img_path'"
        if len(text) != len(image):
            raise ValueError(
                f"{where}: expected lists of equal length, got {len(text)} texts and {len(image)} image paths; "
                'write "" for the side a candidate does not have'
            )
        if not text:
            raise ValueError(f"{where}: the row has no candidates, so no positive; put the positive first in the lists")
        for at, (one_text, one_image) in enumerate(zip(text, image)):
            if one_text is None or one_image is None:
                raise ValueError(f'{where}: candidate {at} is null; write "" for an absent side')
            if not one_text.strip() and not one_image:
                what = "the positive (candidate 0)" if at == 0 else f"candidate {at}"
                raise ValueError(f"{where}: {what} is empty; give it a text or an image, or drop the row")
    _check_paths([("qry_img_path", table["qry_img_path"].to_pylist()), ("tgt_img_path", images)], files, image_root)
    return _dataset(table)


def write_train(root: AnyPath, name: str, rows: list[dict]) -> Path:
    """Write rows with TRAIN_COLUMNS (negatives may be left out); complete or not at all. Returns the file.

    A row may have several negatives, `neg_text` and `neg_image_path` then lists of equal length in every row, and other columns of
    numbers or lists of numbers: a teacher's `scores`, a `grade`.
    """
    import pyarrow as pa

    lists = any(isinstance(row.get(column), list) for row in rows for column in _OPTIONAL)
    kinds = {column: pa.list_(pa.string()) if lists and column in _OPTIONAL else pa.string() for column in TRAIN_COLUMNS}
    others = dict.fromkeys(name for row in rows for name in row if name not in kinds)
    kinds |= {name: pa.list_(pa.float64()) if any(isinstance(row.get(name), list) for row in rows) else pa.float64() for name in others}
    absent = [] if lists else ""
    filled = [{column: row[column] if column in _REQUIRED else row.get(column, absent) for column in TRAIN_COLUMNS} for row in rows]
    filled = [made | {name: row.get(name) for name in others} for made, row in zip(filled, rows)]
    return _write(pa.Table.from_pylist(filled, schema=pa.schema(list(kinds.items()))), Path(root) / name / "original-00000.parquet")


def write_eval(root: AnyPath, name: str, rows: list[dict]) -> Path:
    """Write rows with EVAL_COLUMNS, the positive first in both lists; complete or not at all. Returns the file."""
    import pyarrow as pa

    schema = pa.schema([(column, pa.list_(pa.string()) if column in _LISTS else pa.string()) for column in EVAL_COLUMNS])
    return _write(pa.Table.from_pylist(rows, schema=schema), Path(root) / name / "test-00000.parquet")


def dataset_names(root: AnyPath, split: str | None = None) -> list[str]:
    """Names of the datasets below `root`, sorted: the folders that hold a parquet file (of `split`, where given)."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; expected one folder per dataset in it")
    pattern = f"{split}-*.parquet" if split else "*.parquet"
    return sorted(folder.name for folder in root.iterdir() if folder.is_dir() and any(folder.glob(pattern)))


def to_item(text: str, image_path: str, image_root: AnyPath) -> dict:
    """One side of a row as `model.encode` takes it: {"text": str, "image": absolute or root-relative path, or None}.

    The text keeps MMEB's <|image_1|>; with no image it is an ordinary token, as in WebQA's queries.
    """
    return {"text": text, "image": os.path.join(image_root, image_path) if image_path else None}


def _load(root, name, split, columns, more=()):
    """One table of all shards, and [(first row, file)] to name a row's file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(root) / name
    shards = sorted(folder.glob(f"{split}-*.parquet"))
    if not shards:
        have = "nothing: the folder does not exist"
        if Path(root).is_dir():
            have = ", ".join(dataset_names(root)[:12]) or "no folder with a parquet file in it; write_train makes one"
        raise ValueError(f"{folder}: expected {split}-*.parquet, found none; {root} holds {have}")
    tables, files, rows = [], [], 0
    for file in shards:
        try:
            table = pq.read_table(file, partitioning=None)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file}: not a readable parquet file ({error}); write or download it again") from error
        absent = [c for c in columns if c not in table.column_names and c not in _OPTIONAL]
        if absent:
            raise ValueError(
                f"{file}: column {absent[0]!r} is not there; expected {', '.join(columns)}, got {', '.join(table.column_names)}"
            )
        kept = _typed(table, columns, file)
        for column in more:
            if column in table.column_names and column not in columns:
                kept = kept.append_column(column, table[column])
        tables.append(kept)
        files.append((rows, file))
        rows += table.num_rows
    if not rows:
        raise ValueError(f"{shards[0]}: expected at least one row, got none; write the dataset again")
    return pa.concat_tables(tables), files


def _typed(table, columns, file):
    """The named columns as strings or lists of strings, without nulls."""
    import pyarrow as pa

    arrays = []
    for column in columns:
        several = column in _OPTIONAL and column in table.column_names and pa.types.is_list(table[column].type)
        want = pa.list_(pa.string()) if column in _LISTS or several else pa.string()
        if column not in table.column_names:
            arrays.append(pa.array([""] * table.num_rows, want))
            continue
        values = table[column]
        try:
            values = values.cast(want)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            kind = "lists of strings" if column in _LISTS else "strings"
            raise ValueError(f"{file}, column {column!r}: expected {kind}, got {values.type}; write it as {kind}") from error
        if values.null_count:
            row = values.is_null().to_pylist().index(True)
            raise ValueError(f'{file}, row {row}, column {column!r}: is null; write "" for an absent side')
        arrays.append(values)
    return pa.table(dict(zip(columns, arrays)))


def _check_pairs(table, files, text, image, trouble):
    """Every row has a text or an image; the marker alone is not a text."""
    for row, (one_text, one_image) in enumerate(zip(table[text].to_pylist(), table[image].to_pylist())):
        if not one_image and not one_text.replace(IMAGE_MARKER, "").strip():
            raise ValueError(f"{_place(files, row)}, columns {text!r} and {image!r}: the row {trouble}; fill one of them or drop the row")


def _check_paths(columns, files, image_root):
    checked = set()
    for column, values in columns:
        for row, value in enumerate(values):
            for path in value if isinstance(value, list) else (value,):
                if not path or path in checked:
                    continue
                checked.add(path)
                pure = PurePosixPath(path)
                if pure.is_absolute() or ".." in pure.parts:
                    raise ValueError(
                        f"{_place(files, row)}, column {column!r}: {path!r} leaves the image folder; expected a path relative to it"
                    )
                if image_root is not None and not os.path.isfile(os.path.join(image_root, path)):
                    raise ValueError(
                        f"{_place(files, row)}, column {column!r}: no image {path!r} in {image_root}; "
                        "check the image folder, or unpack the images again"
                    )


def _place(files, row) -> str:
    first, file = next((first, file) for first, file in reversed(files) if row >= first)
    return f"{file}, row {row - first}"


def _dataset(table):
    import datasets

    return datasets.Dataset(table)


def _write(table, file: Path) -> Path:
    write_table(file, table)
    return file
