"""Vectors on disk: files of at most `ROWS` vectors that are written once, never changed, and mapped into memory to be read.

    vectors-{digest}.safetensors     "vectors" (n, D) float32, "contents" (n, 16) uint8; metadata "identity", the maker's digest

The name is the digest of what is inside, so that damage shows. The contents' digests say whose vectors these are even where no index
names the file yet: an update that was killed left them, and the next one need not make them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlm2vec.files import replacing

ROWS = 8192
PREFIX, SUFFIX = "vectors-", ".safetensors"


class Segment(NamedTuple):
    """One file of vectors, opened.

    Attributes:
        name: of the file.
        vectors: (n, D) float32, mapped.
        contents: n digests of what the vectors are of.
    """

    name: str
    vectors: torch.Tensor
    contents: list[bytes]


def _name(vectors: torch.Tensor, contents: bytes) -> str:
    digest = hashlib.blake2b(contents, digest_size=12)
    digest.update(vectors.numpy())
    return f"{PREFIX}{digest.hexdigest()}{SUFFIX}"


def write_segment(folder: Path, vectors: torch.Tensor, contents: list[bytes], identity: str) -> str:
    """Write (n, D) float32 vectors and their n contents' digests; on disk when this returns. Gives the file's name."""
    from safetensors.torch import save_file

    vectors, raw = vectors.contiguous(), b"".join(contents)
    name = _name(vectors, raw)
    if not (folder / name).exists():
        table = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(len(contents), -1)
        with replacing(folder / name) as part:
            save_file({"vectors": vectors, "contents": table}, part, metadata={"identity": identity})
    return name


def open_segment(folder: Path, name: str, identity: str | None = None, verify: bool = True) -> Segment:
    """Map a file of vectors.

    Args:
        identity: the maker's digest that is asked for; None: any.
        verify: read it whole and compare it with its name.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged, or another model's; says which file.
    """
    from safetensors import SafetensorError, safe_open

    if not (folder / name).exists():
        raise FileNotFoundError(2, "no such file", str(folder / name))
    try:
        with safe_open(folder / name, "pt") as f:
            vectors, contents, about = f.get_tensor("vectors"), f.get_tensor("contents"), f.metadata() or {}
    except SafetensorError as e:
        raise ValueError(f"{folder / name} does not read back ({e}); remove the index and make it again") from e
    raw = contents.numpy().tobytes()
    if verify and _name(vectors, raw) != name:
        raise ValueError(f"{folder / name} is damaged (its content is not what was written); remove the index and make it again")
    if identity is not None and about.get("identity") != identity:
        raise ValueError(f"{folder / name} was made by another model; remove it")
    size = contents.shape[1]
    return Segment(name, vectors, [raw[i : i + size] for i in range(0, len(raw), size)])


class SegmentWriter:
    """Collects vectors and writes a segment whenever `ROWS` are there: at most one segment's vectors are in memory.

    Args:
        written: is called with the name and the rows of each segment that was written.
    """

    def __init__(self, folder: Path, identity: str, written: Callable[[str, list[Any]], None]):
        self.folder, self.identity, self.written = folder, identity, written
        self._vectors: list[torch.Tensor] = []
        self._rows: list[Any] = []
        self._contents: list[bytes] = []

    def add(self, vectors: torch.Tensor, contents: list[bytes], rows: list[Any]) -> None:
        """(n, D) vectors, the digests of their n contents, and n rows, whatever the caller keeps beside a vector."""
        for start in range(0, len(rows), ROWS):
            piece = slice(start, start + ROWS)
            self._vectors.append(vectors[piece].to("cpu", torch.float32))
            self._rows += rows[piece]
            self._contents += contents[piece]
            while len(self._rows) >= ROWS:
                self._write(ROWS)

    def close(self) -> None:
        """Write what is left."""
        if self._rows:
            self._write(len(self._rows))

    def _write(self, count: int) -> None:
        together = torch.cat(self._vectors)
        name = write_segment(self.folder, together[:count], self._contents[:count], self.identity)
        self.written(name, self._rows[:count])
        self._vectors = [together[count:].clone()] if len(together) > count else []
        self._rows, self._contents = self._rows[count:], self._contents[count:]
