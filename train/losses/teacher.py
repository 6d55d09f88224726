"""A teacher's embeddings of the training rows, read from files that `python -m train teach` or `vlm2vec embed` wrote.

A row's key is SOURCE/ROW, the row counted from 0; in files for a recipe of one source ROW alone will do, the key that `vlm2vec embed`
gives to the lines of a JSONL.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch

from vlm2vec.commands.common import read_embeddings

from ..command import COMMAND


class TeacherVectors:
    """A file's vectors, found by the rows of a recipe.

    Args:
        path: of the file. sources: names of the recipe's sources, in their order.

    Raises:
        ValueError: no file of embeddings.
    """

    def __init__(self, path: str, sources: Sequence[str]):
        self.path, self.sources = path, sources
        embeddings, keys, _ = read_embeddings(path)
        self.embeddings = torch.nn.functional.normalize(embeddings.float(), dim=-1)
        self._place = {key: place for place, key in enumerate(keys)}

    def of(self, rows: Sequence[tuple[int, int]], absent: Sequence[bool]) -> torch.Tensor:
        """(len(rows), D) float32 of length 1; zeros where a row is `absent`.

        Raises:
            ValueError: a row that has no vector; names it and the mend.
        """
        found = [-1 if gone else self._find(*row) for row, gone in zip(rows, absent, strict=True)]
        places = torch.tensor(found, dtype=torch.int64)
        return torch.where((places >= 0)[:, None], self.embeddings[places.clamp(min=0)], 0.0)

    def _find(self, source: int, row: int) -> int:
        keys = [f"{self.sources[source]}/{row}", *([str(row)] if len(self.sources) == 1 else [])]
        place = next((self._place[key] for key in keys if key in self._place), None)
        if place is None:
            raise ValueError(
                f"{self.path}: expected a vector for row {row} of {self.sources[source]} (key {keys[0]!r}), got none; make the file anew "
                f"with {COMMAND} teach RECIPE --teacher MODEL -o FOLDER"
            )
        return place


@functools.lru_cache(maxsize=8)
def _opened(path: str, changed: int, sources: tuple[str, ...]) -> TeacherVectors:
    return TeacherVectors(path, sources)


def teacher_vectors(path: str, sources: Sequence[str]) -> TeacherVectors:
    """The vectors of a file, read once while it stays as it is."""
    if not os.path.isfile(path):
        raise ValueError(f"teacher: {path}: no such file; {COMMAND} teach RECIPE --teacher MODEL -o FOLDER writes query and target files")
    return _opened(path, os.stat(path).st_mtime_ns, tuple(sources))
