"""JSON lines: one JSON value a line, and lines end at line feeds alone: U+2028, U+0085 and their like may stand inside of strings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from vlm2vec.files.documents import parse_json, require_regular
from vlm2vec.inputs import whole_characters


def read_json_lines(path: str | os.PathLike) -> list[tuple[int, Any]]:
    """`iter_json_lines`, whole."""
    return list(iter_json_lines(path))


def iter_json_lines(path: str | os.PathLike) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line that is not blank, a line in memory at a time. Halves of surrogate pairs become U+FFFD.

    Raises:
        ValueError: names the file, and the line that is not JSON.
    """
    require_regular(path)
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, read_json_value(line, f"{path}, line {number}")
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8") from e


def read_json_value(text: str, where: str) -> Any:
    """One JSON value, halves of surrogate pairs in its strings as U+FFFD. ValueError begins with `where`."""
    value = parse_json(text, where)
    return _whole(value) if "\\u" in text else value


def read_json_rows(path: str | os.PathLike) -> dict[str, list[Any]]:
    """Columns of a file of JSON objects, one a line; None where a row lacks a column.

    Raises:
        ValueError: names the file and the line that is not JSON, or no object.
    """
    rows = read_json_lines(path)
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {type(row).__name__}; write one object a line")
    names = dict.fromkeys(name for _, row in rows for name in row)
    return {name: [row.get(name) for _, row in rows] for name in names}


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [_whole(entry) for entry in value]
    if isinstance(value, dict):
        return {whole_characters(name): _whole(entry) for name, entry in value.items()}
    return value
