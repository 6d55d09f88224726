"""The sources of a mixture: tables of rows in the formats of `vlm2vec.data.row_formats`, or of people's own columns (`vlm2vec.data.sides`).

Tables stay on disk: hub data sets and large local ones are Arrow files that `datasets` maps into memory, JSON lines and tar shards are
read by their places.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm2vec.data.mmeb import read_train
from vlm2vec.data.row_formats import FORMATS, Row, RowFormat
from vlm2vec.data.sides import columns_of
from vlm2vec.data.tables import ENDINGS, open_table
from vlm2vec.data.tables.arrow import load
from vlm2vec.data.tables.table import nearest
from vlm2vec.files.documents import require_rows

from ..recipe.schema import Data, Source

_IN_MEMORY_BYTES = 64 << 20  # a local table up to this size is read whole, and every row of it checked at the start
LABELS = ("scores", "grade", "group")


def open_source(data: Data, source: Source) -> SourceTable:
    """A source of a recipe, cut to its number of rows.

    Raises:
        ValueError: no such data set, or one without the columns that the source names.
    """
    opened = _own(data, source) if source.path is not None else _of_format(data, source)
    rows = source.rows if source.rows is not None else data.rows
    return opened if rows is None else opened.first(rows)


class SourceTable:
    """Rows of one source; `table[i]` reads row i and opens nothing.

    Args:
        table: a `datasets.Dataset` or a `vlm2vec.data.tables.Table`.
        format: a name of `FORMATS`, or a format that is made of a source's own columns.
        images: folder where paths of media start.
        scores, grade, group: columns of a teacher's scores (one of lists, or several), of grades and of groups, where there are any.
        left_out: lines of the source's files that are no rows.
        is_own: the rows are of people's own columns, so that media count by the bytes of their files (`train.data.contents`).
    """

    def __init__(
        self,
        table: Any,
        format: str | RowFormat,
        images: str,
        *,
        scores: str | list[str] | None = None,
        grade: str | None = None,
        group: str | None = None,
        left_out: Sequence[str] = (),
        is_own: bool = False,
    ):
        self.table, self.images = table, images
        self.format = FORMATS[format] if isinstance(format, str) else format
        self.scores, self.grade, self.group, self.left_out, self.is_own = scores, grade, group, left_out, is_own
        columns = [column for key in ("scores", "grade") for column in _columns(getattr(self, key))]
        self._labels = table.select_columns(list(dict.fromkeys(columns))) if columns else None
        self._grouped = table.select_columns([group]) if group is not None else None

    def __len__(self) -> int:
        return len(self.table)

    def first(self, rows: int) -> SourceTable:
        """The source of its first rows alone."""
        table = self.table.select(range(min(rows, len(self.table))))
        options = {key: getattr(self, key) for key in (*LABELS, "left_out", "is_own")}
        return SourceTable(table, self.format, self.images, **options)

    def row(self, index: int, frames: int | None) -> Row:
        """Row `index`; a video gives so many of its frames.

        Raises:
            ValueError: the row has not what its format says.
        """
        return self.format.convert(self.table[index], self.images, frames)

    def shown(self, index: int) -> str:
        """What row `index` holds, or why it cannot be read: the same while the data is the same."""
        try:
            return str(self.table[index])
        except ValueError as error:
            return str(error)

    def groups(self) -> list[str | None]:
        """The group of every row as a text, None for a row without one or one that cannot be read."""
        whole = getattr(self._grouped, "column", None)  # a table of one's own that holds its columns apart
        values = whole(self.group) if whole is not None else None
        if values is None and whole is None:
            values = self._grouped[:][self.group]
        return [_named(value) for value in values] if values is not None else [self._group_or_none(row) for row in range(len(self))]

    def group_of(self, index: int) -> str | None:
        """The group of one row."""
        return _named(self._value(self._grouped[index], self.group))

    def _group_or_none(self, index: int) -> str | None:
        try:
            return self.group_of(index)
        except ValueError:  # told when the row is read
            return None

    def labels(self, index: int, documents: int) -> dict[str, Any]:
        """{"grade": number, "scores": [numbers]} of row `index`, what its source has of them.

        Args:
            documents: the row's positive and hard negatives, each of which has its score.

        Raises:
            ValueError: no number where one belongs, or another number of scores than of documents.
        """
        if self._labels is None:
            return {}
        values, labels = self._labels[index], {}
        if self.grade is not None:
            labels["grade"] = _number(self.grade, self._value(values, self.grade))
        if isinstance(self.scores, list):
            labels["scores"] = [_number(column, self._value(values, column)) for column in self.scores]
            _require_scores(", ".join(map(repr, self.scores)), labels["scores"], documents)
        elif self.scores is not None:
            scores = _list(self._value(values, self.scores))
            _require_scores(repr(self.scores), scores, documents)
            labels["scores"] = [_number(self.scores, score) for score in scores]
        return labels

    def _value(self, values: dict[str, Any], column: str) -> Any:
        own = getattr(self.table, "value", None)
        return values[column] if own is None else own(values, column)


def _named(value: Any) -> str | None:
    text = "" if value is None else str(value).strip()
    return text or None


def _columns(told: str | list[str] | None) -> list[str]:
    return [] if told is None else told if isinstance(told, list) else [told]


def _list(cell: Any) -> Any:
    """A list in a cell of text, as JSON writes one."""
    if isinstance(cell, str) and cell.strip().startswith("["):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _require_scores(columns: str, scores: Any, documents: int) -> None:
    if not isinstance(scores, list) or len(scores) != documents:
        got = f"{len(scores)} of them" if isinstance(scores, list) else repr(scores)[:40]
        raise ValueError(
            f"column {columns}: expected {documents} scores, the positive's first and one a hard negative, got {got}; write "
            "them in the order of the negatives"
        )


def _number(column: str, value: Any) -> float:
    found = value
    if isinstance(value, str):  # a cell of a CSV
        try:
            found = float(value)
        except ValueError:
            found = None
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise ValueError(f"column {column!r}: expected a finite number, got {str(value)[:40]}; mend the row")
    return float(found)


def _own(data: Data, source: Source) -> SourceTable:
    """A source whose columns are its own."""
    labels = {key: getattr(source, key) for key in LABELS}
    try:
        wanted = [column for told in labels.values() for column in _columns(told)] + _mentioned(
            [source.query, source.target, source.negatives]
        )
        table = open_table(
            source.path, split=source.split, config=source.config, encoding=source.encoding, delimiter=source.delimiter, wanted=wanted
        )
        if not len(table):
            said = f" ({table.left_out[0]})" if table.left_out else ""
            raise ValueError(f"{source.path} holds no rows{said}; write some below the names of its columns")
        if data.strict and table.left_out:
            raise ValueError(f"{table.left_out[0]}; mend it, or set data.strict to false to leave such lines out")
        images = source.images or data.images or None
        if images is not None and not os.path.isdir(images):
            raise ValueError(f"images: no such folder as {images} (in {os.getcwd()}); name the one where paths of media start")
        columns = columns_of(table, source.query, source.target, source.negatives, images)
        for key, told in labels.items():
            for column in _columns(told):
                try:
                    table.top(column)
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from None
    except ValueError as error:
        raise ValueError(f"source {source.name}: {error}") from error
    names = [*columns.columns, *(column for told in labels.values() for column in _columns(told))]
    format = RowFormat("columns of its own", (), columns.convert)
    return SourceTable(table.select_columns(names), format, columns.media or "", left_out=table.left_out, is_own=True, **labels)


def _mentioned(told: Any) -> list[str]:
    """Whatever may be a column in what a recipe says of its sides."""
    if isinstance(told, str):
        return [told, *(part.split("}")[0] for part in told.split("{")[1:])]
    parts = told.values() if isinstance(told, dict) else told if isinstance(told, list) else ()
    return [column for part in parts for column in _mentioned(part)]


def _of_format(data: Data, source: Source) -> SourceTable:
    """A source in one of the published formats."""
    table = _table(data, source)
    absent = [c for c in FORMATS[source.format].columns if c not in table.column_names]
    if absent:
        raise ValueError(
            f"source {source.name}: format {source.format} needs column {absent[0]!r}, the data has {', '.join(table.column_names)}"
        )
    for key in LABELS:
        for column in _columns(getattr(source, key)):
            if column not in table.column_names:
                raise ValueError(f"source {source.name}: {key} names column {column!r}, {nearest(column, table.column_names)}")
    labels = {key: getattr(source, key) for key in LABELS}
    return SourceTable(table, source.format, source.images or data.images or "", **labels)


def _table(data: Data, source: Source) -> Any:
    root, split = source.root or data.root, source.split or data.split
    if source.format == "mmeb" and os.path.isdir(root) and source.file is None:
        files = sorted(Path(root, source.name).glob(f"{split}-*.parquet"))
        if sum(file.stat().st_size for file in files) <= _IN_MEMORY_BYTES:
            return read_train(root, source.name, split=split, more=[c for key in LABELS for c in _columns(getattr(source, key))])
        return load("parquet", data_files=[os.fspath(file) for file in files], split="train")
    if source.file is not None:
        local = os.path.join(root, source.file)
        if os.path.isdir(root):
            if not os.path.exists(local):
                raise ValueError(f"source {source.name}: no such file as {local}; mend `root` or `file`")
            require_rows(local, lists=True)
        return load("json", data_files=local if os.path.isdir(root) else f"hf://datasets/{root}/{source.file}", split="train")
    if os.path.isdir(root):
        files = sorted(os.fspath(f) for f in Path(root).rglob(f"{split}-*.parquet"))
        if not files:
            raise ValueError(
                f"source {source.name}: no {split}-*.parquet below {root}; download the data set again, or mend `root` or `split`"
            )
        return load("parquet", data_files=files, split="train")
    if os.path.isfile(root):
        raise ValueError(
            f"source {source.name}: root {root} is a file; give the folder that holds {source.name}/{split}-*.parquet, or for rows of "
            "your own say path: FILE with query: and target: columns"
        )
    if os.path.isabs(root) or root.startswith(".") or root.lower().endswith((*ENDINGS, ".arrow")):
        raise ValueError(f"source {source.name}: no such file or folder as {root}; mend `root`, or name a data set of the hub")
    return load(root, *([source.name] if source.format == "mmeb" else []), split=split)
