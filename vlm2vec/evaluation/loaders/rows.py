"""Tables of a task by their paths, row by row: a corpus of any size is read as it is needed and never held.

parquet            in memory up to `HELD_BYTES`, beyond that through the library's memory-mapped cache (as much disk again)
jsonl, json        where each line begins is kept, and a row is read from its place in the file; a JSON list is held
csv, tsv, txt      held
"""

from __future__ import annotations

import csv
import io
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm2vec.data.json_lines import read_json_value
from vlm2vec.evaluation.tasks.task import Task
from vlm2vec.files import AnyPath
from vlm2vec.files.documents import kind, parse_json, read_text, require_regular

IN_MEMORY_BYTES = 256 * 2**20  # of tables of pictures' names and short texts, which are read whole
HELD_BYTES = 64 * 2**20  # of files of a corpus, whose texts take several times as much when they are unpacked
BATCH = 256  # rows that are made at a time when a table is read through


class Rows:
    """A table: `rows[i]` is a dictionary, iteration reads it through once. `source` names it in messages, `columns` may be empty."""

    source: str
    columns: list[str]
    starts: Sequence[tuple[int, str]] = ()  # first row of each file, and the file

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, at: int) -> dict[str, Any]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def only(self, *names: str) -> Iterator[dict[str, Any]]:
        """As iteration, of these columns alone where a table can: ids without the pictures and sounds beside them."""
        return iter(self)

    def where(self, at: int) -> str:
        """How a message names a row: its file, and its number there."""
        file, first = next(((file, first) for first, file in reversed(self.starts) if first <= at), (self.source, 0))
        return f"{file}, row {at - first}"

    def has(self, *names: str) -> str | None:
        """The first of `names` that is a column."""
        return next((name for name in names if name in self.columns), None)


def _starts(files: Sequence[Path], counts: Iterable[int]) -> list[tuple[int, str]]:
    """`Rows.starts` of files with so many rows."""
    found, at = [], 0
    for file, count in zip(files, counts):
        found.append((at, str(file)))
        at += count
    return found


class Held(Rows):
    """A small table, all of it in memory."""

    def __init__(self, files: Sequence[Path], parts: list[list[dict[str, Any]]]):
        self.source, self.rows = str(files[0]), [row for part in parts for row in part]
        self.starts = _starts(files, map(len, parts))
        self.columns = list(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, Any]:
        return self.rows[at]


class Lines(Rows):
    """Files of JSON lines: the place of each line is kept, its content stays in the file."""

    def __init__(self, files: Sequence[Path]):
        self.source = str(files[0])
        self.files, self.columns, self._open, self._lock = list(files), [], {}, threading.Lock()
        self.places: list[tuple[int, int, int]] = []  # file, first byte, bytes of each line
        for number, file in enumerate(files):
            require_regular(file)
            with open(file, "rb") as lines:
                at = 0
                for line in lines:
                    if line.strip().removeprefix(b"\xef\xbb\xbf"):
                        self.places.append((number, at, len(line)))
                    at += len(line)
        of = Counter(number for number, _, _ in self.places)
        self.starts = _starts(files, (of[number] for number in range(len(files))))
        # columns of the first rows: later ones may have more, which `[]` gives all the same
        for at in range(min(len(self.places), 20)):
            self.columns += [name for name in self[at] if name not in self.columns]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: int) -> dict[str, Any]:
        number, start, length = self.places[at]
        with self._lock:  # threads share the place in a file
            if number not in self._open:
                self._open[number] = open(self.files[number], "rb")
            self._open[number].seek(start)
            line = self._open[number].read(length)
        return self._row(at, line)

    def __del__(self) -> None:
        for file in getattr(self, "_open", {}).values():
            file.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        at = 0
        for file in self.files:
            with open(file, "rb") as lines:
                for line in lines:
                    if line.strip().removeprefix(b"\xef\xbb\xbf"):
                        yield self._row(at, line)
                        at += 1

    def _row(self, at, line):
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where(at)} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
        row = read_json_value(text, self.where(at))
        if not isinstance(row, dict):
            raise ValueError(f"{self.where(at)}: expected an object, got {kind(row)}; write one object a line")
        return row


def _held(file: Any) -> Any:
    """A parquet file's rows, unpacked a part at a time: at once they take four times as much as they hold."""
    import pyarrow as pa

    return pa.Table.from_batches(list(file.iter_batches(batch_size=4 * BATCH, use_threads=False)), schema=file.schema_arrow)


class Table(Rows):
    """Parquet files as one Arrow table, held or mapped."""

    def __init__(self, files: Sequence[Path]):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.source = str(files[0])
        try:
            if sum(file.stat().st_size for file in files) > HELD_BYTES:
                from datasets import Dataset

                self.table = Dataset.from_parquet([str(file) for file in files]).data.table
            else:
                self.table = pa.concat_tables([_held(pq.ParquetFile(file, memory_map=True)) for file in files], promote_options="default")
        except (OSError, ValueError, pa.ArrowInvalid) as error:
            told = (str(error).splitlines() or [type(error).__name__])[0][:250]
            raise ValueError(f"{self.source} cannot be read: {told}") from error
        self.columns = self.table.column_names
        self.starts = _starts(files, (pq.read_metadata(file).num_rows for file in files)) if len(files) > 1 else ()
        pa.default_memory_pool().release_unused()  # unpacking takes as much again, and is kept for a next time

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {name: self.table.column(name)[at].as_py() for name in self.columns}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.only(*self.columns)

    def only(self, *names: str) -> Iterator[dict[str, Any]]:
        chosen = self.table.select([name for name in names if name in self.columns])
        for batch in chosen.to_batches(max_chunksize=BATCH):
            yield from batch.to_pylist()


def _separated(file: Path, delimiter: str, header: bool = True) -> list[dict[str, Any]]:
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE  # a quote in a table with tabs is a character like any other
    lines = csv.reader(io.StringIO(read_text(file), newline=""), delimiter=delimiter, quoting=quoting)
    try:
        rows = [(lines.line_num, row) for row in lines if row]
    except csv.Error as error:
        raise ValueError(f"{file}, line {lines.line_num}: expected cells parted by {delimiter!r}, got {error}; mend the line") from None
    if not header:
        return [{str(i): cell for i, cell in enumerate(row)} for _, row in rows]
    names = rows[0][1] if rows else []
    for line, row in rows[1:]:
        if len(row) != len(names):
            raise ValueError(f"{file}, line {line}: expected {len(names)} cells, as the first line has, got {len(row)}; mend the line")
    return [dict(zip(names, row)) for _, row in rows[1:]]


def read_rows(files: Sequence[Path], *, header: bool = True) -> Rows:
    """The table of some files of one kind.

    Args:
        files: at least one path. header: whether the first line of csv and tsv files holds the names; without it they are "0", "1", ...

    Raises: ValueError naming the file, and the row that is wrong.
    """
    suffix = files[0].suffix
    if suffix == ".parquet":
        return Table(files)
    if suffix in (".csv", ".tsv", ".txt"):
        delimiter = "," if suffix == ".csv" else "\t"
        return Held(files, [_separated(file, delimiter, header) for file in files])
    lists = [_is_list(file) for file in files]
    if not any(lists):
        return Lines(files)
    if not all(lists):
        lines, rows = files[lists.index(False)], files[lists.index(True)]
        raise ValueError(f"{lines}: expected a JSON list, as {rows} is, got lines; write them alike")
    parts = [parse_json(read_text(file), str(file)) for file in files]
    for file, rows in zip(files, parts):
        for at, row in enumerate(rows):
            if not isinstance(row, dict):
                raise ValueError(f"{file}, entry {at}: expected an object, got {kind(row)}")
    return Held(files, parts)


def _is_list(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["


def place(path: str, *bases: AnyPath | None) -> Path:
    """A folder below the first of these that holds it, below the first of all where none does."""
    there = [Path(base or ".") / path for base in bases]
    return next((folder for folder in there if folder.is_dir()), there[0])


def find_files(root: AnyPath, patterns: str | Sequence[str]) -> list[Path]:
    """Files of the first pattern that has any, sorted; a pattern is a path below `root` that may hold `*`."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        base = Path(root)
        found = sorted(base.glob(pattern)) if any(c in pattern for c in "*?[") else [base / pattern]
        found = [path for path in found if path.is_file()]
        if found:
            return found
    return []


def open_rows(root: AnyPath | None, task: Task, patterns: str | Sequence[str], what: str, *, header: bool = True) -> Rows:
    """One table of a task. ValueError names the task and where its files were looked for, or a table without rows."""
    files = [] if root is None else find_files(root, patterns)
    if not files:
        looked = ", ".join([patterns] if isinstance(patterns, str) else patterns)
        raise ValueError(f"task {task.name}: no {what} in {os.fspath(root or '.')}; expected {looked} there")
    rows = read_rows(files, header=header)
    if not len(rows):
        raise ValueError(f"{rows.source} has no rows")
    return rows


def require_columns(rows: Rows, *names: str) -> None:
    """ValueError for a table without one of these columns, which names those that it has."""
    for name in names:
        if name not in rows.columns:
            raise ValueError(f"{rows.source}: no column {name!r}; it has {', '.join(rows.columns)}")
