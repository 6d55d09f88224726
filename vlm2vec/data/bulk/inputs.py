"""Inputs as they come: rows of JSON lines and parquet files, files of folders, texts. Nothing is listed beforehand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm2vec.data.json_lines import iter_json_lines
from vlm2vec.files.documents import shown
from vlm2vec.files.walk import files_below
from vlm2vec.inputs import ITEM_KEYS, VISUAL_KEYS
from vlm2vec.media.endings import FILMS, PICTURES
from vlm2vec.media.sources import is_data_uri, is_url

ROWS = 256  # of a parquet file, read together


def stream(paths: list[str], texts: list[str], root: str | None = None) -> Iterator[tuple[str, Any]]:
    """(key, input) of each input, in an order that is the same every time.

    Args:
        paths: .jsonl and .parquet files of rows (text, image, video, instruction; key or id), folders of pictures and films, such files.
        texts: behind them; a text is its own key.
        root: folder that relative paths of rows are taken from; None: each file's own.

    Raises:
        ValueError: what is not there or no row, by its file and line.
    """
    for path in paths:
        if os.path.isdir(path):
            yield from ((found.path, _file(found.path)) for found in files_below(path, PICTURES + FILMS))
        elif not os.path.isfile(path):
            raise ValueError(f"{path}: no such file or folder; a text goes behind --text")
        elif path.lower().endswith(".jsonl"):
            for number, row in iter_json_lines(path):
                yield _row(row, str(number - 1), f"{path}, line {number}", _root(path, root))
        elif path.lower().endswith(".parquet"):
            yield from _parquet(path, _root(path, root))
        else:
            yield path, _file(path)
    for text in texts:
        yield text, text


def _root(path: str, root: str | None) -> str:
    return os.path.dirname(os.path.abspath(path)) if root is None else root


def _file(path: str) -> Any:
    return {"video": path} if path.lower().endswith(FILMS) else Path(path)


def _parquet(path: str, root: str) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table, number = pq.ParquetFile(path), 0
    except (pa.ArrowInvalid, OSError) as e:
        raise ValueError(f"{path}: not a parquet file that can be read ({str(e)[:200]})") from e
    columns = [name for name in table.schema_arrow.names if name in (*ITEM_KEYS, "key", "id")]
    if not set(columns) & set(ITEM_KEYS):
        raise ValueError(f"{path}: columns {shown(table.schema_arrow.names)}; expected some of {', '.join(ITEM_KEYS)}")
    for batch in table.iter_batches(ROWS, columns=columns):
        for row in batch.to_pylist():
            yield _row({name: value for name, value in row.items() if value is not None}, str(number), f"{path}, row {number}", root)
            number += 1


def _row(row: Any, number: str, where: str, root: str) -> tuple[str, Any]:
    """(key, input) of a row, whose relative paths begin at `root`."""
    row = {"text": row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with text, image, video or instruction, got {shown(row)}")
    row = dict(row)
    key = row.pop("key", None)
    key = row.pop("id", None) if key is None else key
    for name in VISUAL_KEYS:
        if row.get(name):
            try:
                row[name] = rooted(root, row[name])
            except TypeError:
                raise ValueError(f"{where}: {name} should be a path or a list of paths, got {shown(row[name])}") from None
    return (number if key is None else str(key)), row


def rooted(root: str, value: Any) -> Any:
    """Paths of a row taken from `root`; URLs, data: URIs, bytes and base64 as they are."""
    if isinstance(value, list):
        return [rooted(root, one) for one in value]
    if isinstance(value, dict):
        return value | {"path": os.path.join(root, value["path"])} if value.get("path") else value
    if isinstance(value, bytes):
        return value
    return value if is_url(value) or is_data_uri(value) else os.path.join(root, value)
