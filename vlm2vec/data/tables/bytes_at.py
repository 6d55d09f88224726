"""Pieces of a file by their places, for several processes and threads at once."""

from __future__ import annotations

import os


class BytesAt:
    """`read(offset, size)` of a file, opened when it is first read; after a fork or in another process it is right as well."""

    def __init__(self, path: str):
        self.path = os.path.abspath(path)
        self._file = None

    def read(self, offset: int, size: int) -> bytes:
        """ValueError where the file ends before."""
        if hasattr(os, "pread"):
            if self._file is None:
                self._file = open(self.path, "rb", buffering=0)  # kept open; its own position is never used
            content = os.pread(self._file.fileno(), size, offset)
        else:
            with open(self.path, "rb") as file:
                file.seek(offset)
                content = file.read(size)
        if len(content) != size:
            raise ValueError(f"{self.path}: cut off, byte {offset + size} is behind its end; copy it again")
        return content

    def __getstate__(self) -> dict:
        return {"path": self.path, "_file": None}
