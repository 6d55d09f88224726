"""JSON lines, read by their places in the file, and JSON files that hold one list of rows.

A line that is no JSON object costs itself: it keeps its row, which says what is wrong with it.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm2vec.data.json_lines import whole_values
from vlm2vec.data.tables.bytes_at import BytesAt
from vlm2vec.data.tables.table import Table
from vlm2vec.files.documents import kind, parse_json, read_text, require_regular

_BLOCK = 64 << 20
_LOOKED_AT = 1000  # rows whose keys are the columns at first; the others are looked through for one that is asked for and is not there
_LARGEST = 1 << 30  # bytes of a file that is read whole
_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"


class JsonLines:
    """The rows of a file of JSON objects, one a line; blank lines are none."""

    def __init__(self, path: str):
        self._name = os.path.basename(path)
        self._file = BytesAt(path)
        ends = _line_ends(path)
        starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
        numbers = np.flatnonzero(ends > starts)
        short = numbers[(ends - starts)[numbers] < 16]
        blank = [n for n in short if not self._file.read(int(starts[n]), int(ends[n] - starts[n])).removeprefix(_BOM).strip(_BLANK)]
        numbers = np.setdiff1d(numbers, blank) if blank else numbers
        self._starts, self._ends = starts[numbers], ends[numbers]
        self._numbers = None if len(numbers) == len(ends) else numbers

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, row: int, columns: Sequence[str] | None) -> dict[str, Any]:
        start, number = int(self._starts[row]), row if self._numbers is None else int(self._numbers[row])
        where = f"{self._name}, line {number + 1}"
        line = self._file.read(start, int(self._ends[row]) - start)
        try:
            text = line.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 text ({error.reason} at its byte {error.start}); save it as UTF-8") from error
        return _object(parse_json(text, where), where, "\\u" in text)

    def column(self, name: str) -> list[Any]:
        """The values of a key in all rows; None where a row lacks it or is none."""
        values = []
        for row in range(len(self)):
            try:
                values.append(self.read(row, None).get(name))
            except ValueError:  # told when the row is read
                values.append(None)
        return values

    def names(self) -> list[str]:
        """Keys of the first rows."""
        names: dict[str, None] = {}
        for row in range(min(_LOOKED_AT, len(self))):
            try:
                names |= dict.fromkeys(self.read(row, None))
            except ValueError:
                continue  # told when the row is read
        return list(names)

    def has(self, name: str) -> bool:
        """Whether any row has this key: lines in which it stands as a text are read."""
        spelled = {json.dumps(name, ensure_ascii=ascii).encode("utf-8", "replace") for ascii in (False, True)}
        with open(self._file.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for text in spelled:
                at = 0
                while (at := content.find(text, at)) >= 0:
                    row = int(np.searchsorted(self._starts, at, side="right")) - 1
                    try:
                        if name in self.read(row, None):
                            return True
                    except ValueError:  # told when the row is read
                        pass
                    at = max(at + 1, int(self._ends[row]))
        return False


class Listed:
    """Rows that were read whole."""

    def __init__(self, rows: list[Any], name: str):
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int, columns: Sequence[str] | None) -> dict[str, Any]:
        return _object(self._rows[row], f"{self._name}, entry {row}", True)

    def names(self) -> list[str]:
        """Keys of all rows."""
        return list(dict.fromkeys(name for row in self._rows if isinstance(row, dict) for name in row))


def open_json(path: str) -> Table:
    """A file of JSON lines, or one whose whole is a list of objects or an object with one such list in it.

    Raises:
        ValueError: names the file: no regular file, no rows, a whole that is no list of rows.
    """
    require_regular(path)
    with open(path, "rb") as file:
        head = file.read(1 << 16).removeprefix(_BOM).lstrip(_BLANK)
    if not head:
        raise ValueError(f"{path} is empty; expected rows, one JSON object a line")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is not UTF-8 text but UTF-16; save it as UTF-8")
    reader = _whole(path) if head[:1] == b"[" or _spread(head) else JsonLines(path)
    if not len(reader):
        raise ValueError(f"{path} holds no rows; expected one JSON object a row")
    late = reader.has if isinstance(reader, JsonLines) and len(reader) > _LOOKED_AT else None
    return Table(reader, reader.names(), os.path.dirname(os.path.abspath(path)), late=late)


def _spread(head: bytes) -> bool:
    """Whether the object at the head goes over several lines."""
    first = head.split(b"\n", 1)
    if len(first) == 1 or head[:1] != b"{":
        return False
    try:
        parse_json(first[0].decode("utf-8", "replace"), "")
    except ValueError:
        return first[0].strip(_BLANK) in (b"{", b"{}") or first[0].rstrip(_BLANK).endswith((b"[", b",", b"{", b":"))
    return False


def _whole(path: str) -> Listed:
    if os.path.getsize(path) > _LARGEST:
        raise ValueError(f"{path}: a list of rows of more than {_LARGEST >> 30} GiB; write JSON lines, one object a line")
    found = parse_json(read_text(path), path)
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) != 1:
            raise ValueError(f"{path}: expected a list of rows, got an object with {len(lists)} lists of objects; write one object a line")
        found = lists[0]
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a list of rows, got {kind(found)}; write one object a line")
    return Listed(found, os.path.basename(path))


def _object(value: Any, where: str, has_escapes: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object of column: value, got {kind(value)}; mend or remove it")
    return whole_values(value) if has_escapes else value


def _line_ends(path: str) -> np.ndarray:
    """(lines,) int64, where each line ends; the file's own end is one."""
    found, size = [], os.path.getsize(path)
    with open(path, "rb") as file:
        at = 0
        while block := file.read(_BLOCK):
            found.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 10).astype(np.int64) + at)
            at += len(block)
    ends = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
    return ends if len(ends) and ends[-1] == size - 1 else np.append(ends, size)
