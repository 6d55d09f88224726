"""CSV and TSV files by pyarrow: every cell is text as it stands, and lines of another number of cells are named and left out.

Nothing is guessed of a cell ("007", "NA" and "2021-01-01" stay texts); an empty cell is an empty text. Guessed is what the file as a
whole is: UTF-16 by its mark, and the separator by the columns that are asked for.
"""

from __future__ import annotations

import codecs
import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm2vec.data.tables.arrow import ArrowRows, announce_copy, mapped
from vlm2vec.data.tables.cache import cached
from vlm2vec.data.tables.csv_lines import LeftOut
from vlm2vec.data.tables.table import Table
from vlm2vec.files.documents import require_regular

SEPARATORS = (",", ";", "\t", "|")
IN_MEMORY = 16 << 20  # bytes of a file that is read whole, in a second; a larger one is laid out for random access once
_BLOCK = 16 << 20  # bytes: a longer line is refused
_LOOKED_AT = 1 << 20  # bytes of a head


def open_csv(path: str, *, encoding: str | None = None, delimiter: str | None = None, wanted: Sequence[str] = ()) -> Table:
    """A file of cells with a line of names at its head.

    Args:
        encoding: in place of UTF-8, or UTF-16 where a mark at the head says so.
        delimiter: in place of the separator under which most of the `wanted` columns are there (a tab in a .tsv).

    Raises:
        ValueError: names the file: empty, no text in this encoding (with the byte), a quote that is never closed, a line beyond 16 MiB.
    """
    require_regular(path)
    encoding = encoding or _encoding(path)
    header, delimiter = _header(path, encoding, delimiter, wanted)
    size = os.path.getsize(path)
    if size <= IN_MEMORY:
        rows, left_out = _whole(path, encoding, delimiter, header)
    else:
        announce_copy(path, size)
        made = cached(path, ".arrow", ("csv", encoding, delimiter), lambda part: _lay_out(path, encoding, delimiter, header, part))
        rows = mapped(made)
        left_out = _left_out(made)
    names = [name.strip() for name in header]
    unique = [name if name and names.index(name) == at else f"{name}\0{at}" for at, name in enumerate(names)]
    repeated = frozenset(name for name in names if names.count(name) > 1)
    named = [name for name in names if name]  # pandas' index has none, nor what follows a comma at the line's end: no column to ask for
    rows = rows.rename_columns(dict(zip(rows.column_names, unique))) if rows.column_names != unique else rows
    return Table(ArrowRows(rows), named, os.path.dirname(os.path.abspath(path)), tuple(left_out), repeated)


def _encoding(path: str) -> str:
    with open(path, "rb") as file:
        head = file.read(_LOOKED_AT)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in head:
        raise ValueError(f"{path}: expected text, got bytes that are 0; say encoding: utf-16-le, or save it as UTF-8")
    return "utf-8"


def _header(path: str, encoding: str, delimiter: str | None, wanted: Sequence[str]) -> tuple[list[str], str]:
    """(names at the head, separator)."""
    try:
        with open(path, encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline="") as file:
            text = file.read(_LOOKED_AT)
    except UnicodeDecodeError as error:
        raise _not_text(path, encoding, error) from error
    except LookupError as error:
        raise ValueError(f"{path}: encoding {encoding!r} is unknown to Python; utf-8, utf-16, cp1252 and latin-1 are usual") from error
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise ValueError(f"{path}: delimiter must be one character, and no quote or line end, got {delimiter!r}; say ';' or '\\t'")
    tried = (delimiter,) if delimiter else ("\t",) if path.lower().endswith(".tsv") else SEPARATORS
    found = [(_first_row(path, text, separator), separator) for separator in tried]

    def fit(pair: tuple[list[str], str]) -> tuple[int, int]:
        names = {name.strip() for name in pair[0]}
        return sum(name in names for name in wanted), len(pair[0])

    return max(found, key=fit)


def _first_row(path: str, text: str, separator: str) -> list[str]:
    try:
        row = next((row for row in csv.reader(text.splitlines(keepends=True), delimiter=separator) if row), None)
    except csv.Error as error:
        raise ValueError(f"{path}: its first line cannot be read as names of columns ({error}); write them in front of the rows") from error
    if row is None:
        raise ValueError(f"{path} is empty; expected names of columns in its first line, and rows below")
    return row


def _reader(path: str, encoding: str, delimiter: str, header: list[str], left_out: LeftOut) -> Any:
    import pyarrow as pa
    import pyarrow.csv

    return pa.csv.open_csv(
        path,
        read_options=pa.csv.ReadOptions(use_threads=False, block_size=_BLOCK, encoding=encoding),
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=left_out),
        convert_options=pa.csv.ConvertOptions(strings_can_be_null=False, column_types={each: pa.string() for each in header}),
    )


def _batches(path: str, encoding: str, delimiter: str, header: list[str], left_out: LeftOut) -> Any:
    """Record batches under names of their own ("0", "1", ...), since several columns may bear one name."""
    import pyarrow as pa

    names = list(map(str, range(len(header))))
    last, count = None, 1  # the first line
    try:
        for batch in _reader(path, encoding, delimiter, header, left_out):
            if not all(pa.types.is_string(kind) for kind in batch.schema.types) or batch.num_columns != len(header):
                raise ValueError(f"{path}: its first line cannot be read as names of columns; write them in front of the rows, one a cell")
            last, count = batch if batch.num_rows else last, count + batch.num_rows
            yield pa.RecordBatch.from_arrays(batch.columns, names=names)
    except pa.ArrowInvalid as error:
        raise _refused(path, encoding, str(error)) from error
    except UnicodeDecodeError as error:
        raise _not_text(path, encoding, error) from error
    swallowed = left_out.swallowed(count + len(left_out.rows), delimiter)
    if _ends_unquoted(path, last) if swallowed is None else swallowed:
        raise ValueError(f"{path}: a quote in its last rows is never closed, so that a cell took the lines behind it; close or double it")


def _ends_unquoted(path: str, last: Any) -> bool:
    """A last cell of several lines stands in quotes, so that the file ends with one; without it, the cell took the rest of the file."""
    if last is None or "\n" not in str(last.column(last.num_columns - 1)[-1].as_py()):
        return False
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 64))
        return not file.read().replace(b"\0", b"").rstrip().endswith(b'"')


def _whole(path: str, encoding: str, delimiter: str, header: list[str]) -> tuple[Any, list[str]]:
    """(rows, lines that are none)."""
    import datasets
    import pyarrow as pa

    schema, left_out = pa.schema([(str(at), pa.string()) for at in range(len(header))]), LeftOut()
    rows = pa.Table.from_batches(_batches(path, encoding, delimiter, header, left_out), schema=schema)
    return datasets.Dataset(rows), left_out.said(path, encoding, delimiter)


def _lay_out(path: str, encoding: str, delimiter: str, header: list[str], part: Path) -> None:
    """The rows as an Arrow file. What was left out is known at the end alone, so that the rows are read twice."""
    import pyarrow as pa

    left_out = LeftOut()
    for _ in _batches(path, encoding, delimiter, header, left_out):
        pass
    said = "\n".join(left_out.said(path, encoding, delimiter))
    schema = pa.schema([(str(at), pa.string()) for at in range(len(header))], metadata={"left_out": said})
    with pa.OSFile(os.fspath(part), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in _batches(path, encoding, delimiter, header, LeftOut()):
            writer.write_batch(batch)


def _left_out(path: Path) -> list[str]:
    """What a laid-out file says was left out of it."""
    import pyarrow as pa

    with pa.memory_map(os.fspath(path)) as file:
        told = (pa.ipc.open_stream(file).schema.metadata or {}).get(b"left_out", b"").decode()
    return told.split("\n") if told else []


def _refused(path: str, encoding: str, said: str) -> ValueError:
    if "UTF8" in said or "utf8" in said:
        with open(path, "rb") as file:
            decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
            while block := file.read(_LOOKED_AT):
                try:
                    decoder.decode(block)
                except UnicodeDecodeError as error:
                    return _not_text(path, encoding, error, before=at)
                at += len(block)
    if "straddl" in said:
        return ValueError(f"{path}: a line is longer than {_BLOCK >> 20} MiB; is a quote never closed? Close it, or write JSON lines")
    return ValueError(f"{path} cannot be read as CSV ({' '.join(said.split())[:200]}); write it anew")


def _not_text(path: str, encoding: str, error: UnicodeDecodeError, before: int = 0) -> ValueError:
    return ValueError(
        f"{path}: expected text in {encoding}, got byte {before + error.start} that is none ({error.reason}); say "
        "encoding: cp1252 (or what it was saved in), or save it as UTF-8"
    )
