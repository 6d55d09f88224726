"""What an index may hold: the pictures, films and texts of a folder, or the rows of a JSONL, and how each is known again.

An entry is known by its key, the path below the folder or the row's own key. Its stamp says the size and time of change of the files it
is made of, which costs no reading; only where the stamp is another one, the content is read and its digest compared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlm2vec.data.json_lines import read_json_lines
from vlm2vec.evaluation.encode.keys import ContentHashes, item_key
from vlm2vec.files.documents import read_text, shown
from vlm2vec.files.walk import files_below
from vlm2vec.inputs import MODALITIES, VISUAL_KEYS
from vlm2vec.media.endings import FILMS, PICTURES
from vlm2vec.media.sources import is_data_uri, is_url

TEXTS = (".txt", ".md")
KINDS = dict(zip(MODALITIES, (TEXTS, PICTURES, FILMS), strict=True))
ROW = "row"  # the kind of a JSONL's rows
SNIPPET = 300  # characters of a text that the index keeps to be shown
SETTLED_NS = 2_000_000_000  # a file that changed this short a time ago may change again within one tick of its clock


@dataclass(frozen=True)
class Entry:
    """One thing that may be found.

    Attributes:
        key: what `search` answers with.
        kind: "image", "video", "text" or "row".
        stamp: sizes and times of its files; "" where they are too fresh to be trusted.
        source: the file, or the row as an object.
    """

    key: str
    kind: str
    stamp: str
    source: str | dict

    def as_input(self) -> dict[str, Any]:
        """What the model is given. ValueError where a text file cannot be read."""
        if isinstance(self.source, dict):
            return self.source
        return {self.kind: read_text(self.source) if self.kind == "text" else self.source}

    def content(self) -> bytes:
        """16-byte digest of all that its vector depends on, the model apart. ValueError where a file cannot be read."""
        return item_key(self.as_input(), ContentHashes())

    def shown(self) -> tuple[str, str]:
        """(file to be shown or "", text to be shown or "")."""
        if isinstance(self.source, str):
            return (self.source, "") if self.kind != "text" else (self.source, self.as_input()["text"][:SNIPPET])
        files = [file for name in VISUAL_KEYS for file in _files(self.source.get(name))]
        text = self.source.get("text")
        return (files[0] if files else "", text[:SNIPPET] if isinstance(text, str) else "")


def entries(where: str | os.PathLike, kinds: tuple[str, ...] = tuple(KINDS)) -> Iterator[Entry]:
    """Entries of a folder and the folders below it, in order of their paths, or of a JSONL's rows.

    Args:
        kinds: of a folder: which of "image", "video" and "text" are taken.

    Raises:
        ValueError: neither a folder nor a .jsonl file, two rows of one key, a line that is no row.
    """
    where = os.path.abspath(where)
    if os.path.isdir(where):
        endings = {ending: kind for kind in kinds for ending in KINDS[kind]}
        now = time.time_ns()
        for key, path in files_below(where, tuple(endings)):
            yield Entry(key, endings[os.path.splitext(path)[1].lower()], _stamp([path], now), path)
    elif os.path.isfile(where) and where.lower().endswith(".jsonl"):
        yield from _rows(where)
    else:
        raise ValueError(f"{where}: expected a folder of images, films and texts, or a .jsonl file; there is no such")


def _stamp(files: list[str], now: int, text: str = "") -> str:
    parts = [text] if text else []
    for file in files:
        try:
            found = os.stat(file)
        except OSError:
            return ""  # told when it is read
        if now - found.st_mtime_ns < SETTLED_NS:
            return ""
        parts.append(f"{found.st_size}.{found.st_mtime_ns}")
    return " ".join(parts)


def _rows(path: str) -> Iterator[Entry]:
    now, root, seen = time.time_ns(), os.path.dirname(path), set()
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        row = {"text": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with text, image, video or instruction, got {shown(row)}")
        row = dict(row)
        key = row.pop("key", row.pop("id", None))
        key = str(number - 1 if key is None else key)
        if key in seen:
            raise ValueError(f"{where}: a row with the key {shown(key)} stands above; give every row its own")
        seen.add(key)
        for name in VISUAL_KEYS:
            if row.get(name):
                row[name] = _rooted(root, row[name], f"{where}: {name}")
        files = [file for name in VISUAL_KEYS for file in _files(row.get(name))]
        said = item_key({**row, **dict.fromkeys(VISUAL_KEYS)}, ContentHashes()).hex()
        yield Entry(key, ROW, _stamp(files, now, said), row)


def _rooted(root: str, value: Any, where: str) -> Any:
    """Paths from the JSONL's folder. ValueError for what is no path."""
    if isinstance(value, list):
        return [_rooted(root, one, where) for one in value]
    if not isinstance(value, str) or is_url(value) or is_data_uri(value):
        raise ValueError(f"{where} should be a path or a list of paths, got {shown(value)}")
    return os.path.join(root, value)


def _files(value: Any) -> list[str]:
    if isinstance(value, list):
        return [file for one in value for file in _files(one)]
    return [value] if isinstance(value, str) and value else []
