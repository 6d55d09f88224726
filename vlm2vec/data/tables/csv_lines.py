"""Rows of a CSV file that have another number of cells than its first: which lines they are, and whether a quote took the file's end."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass, field
from typing import Any

_SHOWN = 60  # characters of a row that is left out


@dataclass
class LeftOut:
    """What pyarrow left out of a file.

    Attributes:
        rows: (number, counting the first row and no empty line, from 1; cells; text in short) of each. last: the whole text of the last.
    """

    expected: int = 0
    rows: list[tuple[int, int, str]] = field(default_factory=list)
    last: str = ""

    def __call__(self, row: Any) -> str:
        """pyarrow's `invalid_row_handler`."""
        text = row.text or ""
        shown = " ".join(text.split())
        self.rows.append((row.number, row.actual_columns, shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."))
        self.expected, self.last = row.expected_columns, text
        return "skip"

    def said(self, path: str, encoding: str, delimiter: str) -> list[str]:
        """A line for each, by the number of the line it begins in; by its own, where Python's reader finds other rows than pyarrow."""
        if not self.rows:
            return []
        lines = _lines(path, encoding, delimiter, self.expected, [cells for _, cells, _ in self.rows])
        name, places = os.path.basename(path), [f"line {line}" for line in lines or ()] or [f"row {number}" for number, _, _ in self.rows]
        return [
            f"{name}, {place}: {cells} cells, expected the {self.expected} of the first line, in {shown!r}"
            for place, (_, cells, shown) in zip(places, self.rows)
        ]

    def swallowed(self, rows: int, delimiter: str) -> bool | None:
        """Whether the last of the file's `rows` was left out and holds lines behind a quote that is never closed; None: it was not."""
        if not self.rows or self.rows[-1][0] != rows:
            return None
        try:
            list(csv.reader(io.StringIO(self.last, newline=""), delimiter=delimiter, strict=True))
        except csv.Error as error:
            return "end of data" in str(error) and len(self.last.splitlines()) > 1
        return False


def _lines(path: str, encoding: str, delimiter: str, expected: int, cells: list[int]) -> list[int] | None:
    """The line that each row of so many `cells` begins in; None where they are not the file's rows of another number than expected."""
    found, before, counts = [], 0, []
    try:
        with open(path, encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            for row in reader:
                if row and len(row) != expected:
                    found.append(before + 1)
                    counts.append(len(row))
                before = reader.line_num
    except (csv.Error, UnicodeDecodeError):  # a cell beyond its limit
        return None
    return found if counts == cells else None
