"""A teacher's embeddings of the training rows, read from files that `python -m train teach` or `vlm2vec embed` wrote.

A row's key is SOURCE/ROW, the row counted from 0; in files for a recipe of one source ROW alone will do, the key that `vlm2vec embed`
gives to the lines of a JSONL.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from vlm2vec.commands.common import read_embeddings

from ..command import COMMAND


class TeacherVectors:
    """A file's vectors, found by the rows of a recipe. They stay in the file, of which rows are read as they are asked for.

    Args:
        path: of the file. sources: names of the recipe's sources, in their order.

    Raises:
        ValueError: no file of embeddings.
    """

    def __init__(self, path: str, sources: Sequence[str]):
        self.path, self.sources = path, sources
        self._embeddings, keys, _ = read_embeddings(path)  # mapped by safetensors: what is not asked for takes no memory
        self._place = {key: place for place, key in enumerate(keys)}

    def places(self, rows: Sequence[tuple[int, int]]) -> np.ndarray:
        """(len(rows),) int64, where in the file each (source, row) is; -1 where it is not."""
        return np.array([self._find(*row) for row in rows], dtype=np.int64)

    def read(self, places: np.ndarray) -> torch.Tensor:
        """(len(places), D) float32 of length 1; zeros where a place is -1."""
        absent = torch.from_numpy(places < 0)[:, None]
        if absent.all():
            return torch.zeros(len(places), self._embeddings.shape[1])
        vectors = self._embeddings[torch.from_numpy(places.clip(min=0))].float()
        return torch.nn.functional.normalize(vectors, dim=-1).masked_fill(absent, 0.0)

    def key(self, source: int, row: int) -> str:
        """The key under which `train teach` writes a row."""
        return f"{self.sources[source]}/{row}"

    def _find(self, source: int, row: int) -> int:
        place = self._place.get(self.key(source, row), -1)
        return self._place.get(str(row), -1) if place < 0 and len(self.sources) == 1 else place


_OPEN: dict[tuple[str, tuple[str, ...]], tuple[int, TeacherVectors]] = {}  # each with the time at which its file was written


def teacher_vectors(path: str, sources: Sequence[str]) -> TeacherVectors:
    """The vectors of a file, opened once while it stays as it is."""
    if not os.path.isfile(path):
        raise ValueError(f"teacher: {path}: no such file; {COMMAND} teach RECIPE --teacher MODEL -o FOLDER writes query and target files")
    key, written = (path, tuple(sources)), os.stat(path).st_mtime_ns
    if key not in _OPEN or _OPEN[key][0] != written:
        _OPEN[key] = written, TeacherVectors(path, sources)
    return _OPEN[key][1]
