"""Which inputs are the same: a number for each content, equal for equal ones on every rank and in every run.

Pictures and films of people's own tables count by the bytes of their files, wherever they lie, so that a copy under a second name is the
same picture whether the table holds its path or its bytes; files are read for it a row at a time, where the row is made. In the published
formats a path stands for its picture.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec.inputs import whole_characters
from vlm2vec.media.endings import PICTURES
from vlm2vec.media.sampling import frame_files
from vlm2vec.media.sources import is_data_uri, loadable

_EDGE = 1 << 20  # bytes at either end of a film, which with its size stand for it
_FRAMES = 8  # of a film of files, which with the sizes of all stand for it
_REMEMBERED = 1 << 16  # files, as they were


def content_id(item: dict[str, Any], *, by_bytes: bool = False) -> int:
    """The same non-negative 63-bit number for the same content, on every rank and in every run.

    Args:
        item: an input. by_bytes: a file stands for what is in it, not for its path.

    Raises:
        OSError: by_bytes, and a file that cannot be read.
    """
    digest = hashlib.blake2b(whole_characters(item["text"]).encode(), digest_size=8)
    if item.get("instruction"):
        digest.update(b"\1" + whole_characters(item["instruction"]).encode())
    visuals = [item[kind] for kind in ("image", "video") if item.get(kind)]
    if visuals and by_bytes:
        for kind, digest_of in (("image", picture_digest), ("video", film_digest)):
            for source in _each(item.get(kind), kind):
                digest.update(b"\2" + digest_of(source))
    else:
        for part in _flat(visuals) or [""]:
            digest.update(b"\0")
            digest.update(part if isinstance(part, bytes) else Path(part).as_posix().encode() if part else b"")
    return int.from_bytes(digest.digest(), "little") >> 1


def picture_digest(source: str | os.PathLike | bytes) -> bytes:
    """16 bytes of a picture's file, given by its path, its bytes or a data: URI."""
    source = loadable(source) if is_data_uri(source) else source
    return _whole(source) if isinstance(source, bytes) else _of_file(os.fspath(source), False)


def film_digest(source: Any) -> bytes:
    """16 bytes of a film: its size and both ends of its file; of frames in files or a folder, their sizes and some of them whole."""
    if isinstance(source, bytes):
        return _ends(len(source), source[:_EDGE], source[max(_EDGE, len(source) - _EDGE) :])
    if not isinstance(source, list) and os.path.isdir(source):
        source = frame_files(source)
    if not isinstance(source, list):
        return _of_file(os.fspath(source), True)
    sizes = [len(frame) if isinstance(frame, bytes) else os.path.getsize(frame) for frame in source]
    chosen = sorted(set(np.linspace(0, len(source) - 1, _FRAMES).astype(int).tolist())) if source else []
    return _whole(repr(sizes).encode() + b"".join(picture_digest(source[at]) for at in chosen))


def _of_file(path: str, is_film: bool) -> bytes:
    about = os.stat(path)
    return _as_it_is(path, about.st_size, about.st_mtime_ns, is_film)


@lru_cache(_REMEMBERED)
def _as_it_is(path: str, size: int, changed: int, is_film: bool) -> bytes:
    with open(path, "rb") as file:
        if not is_film:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        first = file.read(_EDGE)
        file.seek(max(_EDGE, size - _EDGE))
        return _ends(size, first, file.read())


def _ends(size: int, first: bytes, last: bytes) -> bytes:
    return _whole(str(size).encode() + b"\0" + first + last)


def _whole(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _each(told: Any, kind: str) -> list[Any]:
    """The pictures or films of an input; files of pictures are the frames of one film."""
    if not isinstance(told, list):
        return [told] if told else []
    is_film = kind == "video" and all(isinstance(one, (str, os.PathLike)) and os.fspath(one).lower().endswith(PICTURES) for one in told)
    return [told] if is_film else told


def _flat(visuals: list) -> list:
    return [part for visual in visuals for part in (_flat(visual) if isinstance(visual, list) else [visual])]
