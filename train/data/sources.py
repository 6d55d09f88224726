"""The sources of a mixture: tables of rows in the formats of `vlm2vec.data.row_formats`, from local folders or the hub.

Tables stay on disk: hub data sets and large local ones are Arrow files that `datasets` maps into memory.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from vlm2vec.data.mmeb import read_train
from vlm2vec.data.row_formats import FORMATS, Row
from vlm2vec.files.documents import require_rows

from ..recipe.schema import Data, Source

_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")
_IN_MEMORY_BYTES = 64 << 20  # a local table up to this size is read whole, and every row of it checked at the start


def open_source(data: Data, source: Source) -> SourceTable:
    """A source of a recipe, cut to its number of rows.

    Raises:
        ValueError: no such data set, or one without the columns of its format.
    """
    table = _table(data, source)
    absent = [c for c in FORMATS[source.format].columns if c not in table.column_names]
    if absent:
        raise ValueError(
            f"source {source.name}: format {source.format} needs column {absent[0]!r}, the data has {', '.join(table.column_names)}"
        )
    for key in ("scores", "grade"):
        column = getattr(source, key)
        if column is not None and column not in table.column_names:
            raise ValueError(
                f"source {source.name}: {key} names column {column!r}, the data has {', '.join(table.column_names)}; name one of these"
            )
    rows = source.rows if source.rows is not None else data.rows
    if rows is not None:
        table = table.select(range(min(rows, len(table))))
    return SourceTable(table, source.format, source.images or data.images, scores=source.scores, grade=source.grade)


class SourceTable:
    """Rows of one source; `table[i]` reads row i and opens nothing.

    Args:
        scores, grade: columns of a teacher's scores and of grades, where there are any.
    """

    def __init__(self, table: Any, format: str, images: str, *, scores: str | None = None, grade: str | None = None):
        self.table, self.images, self.format = table, images, FORMATS[format]
        self.scores, self.grade = scores, grade
        columns = [column for column in (scores, grade) if column is not None]
        self._labels = table.select_columns(columns) if columns else None

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int, frames: int | None) -> Row:
        """Row `index`; a video gives so many of its frames.

        Raises:
            ValueError: the row has not what its format says.
        """
        return self.format.convert(self.table[index], self.images, frames)

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
            labels["grade"] = _number(self.grade, values[self.grade])
        if self.scores is not None:
            scores = values[self.scores]
            if not isinstance(scores, list) or len(scores) != documents:
                got = f"{len(scores)} of them" if isinstance(scores, list) else repr(scores)[:40]
                raise ValueError(
                    f"column {self.scores!r}: expected {documents} scores, the positive's first and one a hard negative, got {got}; write "
                    "them in the order of the negatives"
                )
            labels["scores"] = [_number(self.scores, score) for score in scores]
        return labels


def _number(column: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"column {column!r}: expected a finite number, got {str(value)[:40]}; mend the row")
    return float(value)


def _table(data: Data, source: Source) -> Any:
    root, split = source.root or data.root, source.split or data.split
    if source.format == "mmeb" and os.path.isdir(root) and source.file is None:
        files = sorted(Path(root, source.name).glob(f"{split}-*.parquet"))
        if sum(file.stat().st_size for file in files) <= _IN_MEMORY_BYTES:
            return read_train(root, source.name, split=split, more=[c for c in (source.scores, source.grade) if c is not None])
        return _load("parquet", data_files=[os.fspath(file) for file in files], split="train")
    if source.file is not None:
        local = os.path.join(root, source.file)
        if os.path.isdir(root):
            if not os.path.exists(local):
                raise ValueError(f"source {source.name}: no such file as {local}; mend `root` or `file`")
            require_rows(local, lists=True)
        return _load("json", data_files=local if os.path.isdir(root) else f"hf://datasets/{root}/{source.file}", split="train")
    if os.path.isdir(root):
        files = sorted(os.fspath(f) for f in Path(root).rglob(f"{split}-*.parquet"))
        if not files:
            raise ValueError(
                f"source {source.name}: no {split}-*.parquet below {root}; download the data set again, or mend `root` or `split`"
            )
        return _load("parquet", data_files=files, split="train")
    if os.path.isfile(root):
        raise ValueError(
            f"source {source.name}: root {root} is a file; give the folder that holds {source.name}/{split}-*.parquet "
            "(vlm2vec.data.mmeb.write_train writes one from rows of your own)"
        )
    if os.path.isabs(root) or root.startswith(".") or root.lower().endswith(_TABLES):
        raise ValueError(f"source {source.name}: no such file or folder as {root}; mend `root`, or name a data set of the hub")
    return _load(root, *([source.name] if source.format == "mmeb" else []), split=split)


def _load(*names: str, **options: Any) -> Any:
    import datasets

    try:
        table = datasets.load_dataset(*names, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        files = options.get("data_files")
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if files is not None and "hf://" not in str(files):  # a local file has nothing to do with the network
            first = files if isinstance(files, str) else files[0]
            raise ValueError(f"{first} cannot be read as {names[0]} ({said}); is it one row a line, or a whole parquet file?") from error
        raise ValueError(f"data set {' '.join(names)} cannot be loaded ({said}); is it there, and is the network?") from error
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))  # the encoded file; decoded where it is needed
    return table
