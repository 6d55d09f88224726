"""The files below a folder, in one order, for all that index, embed or search folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple


class Found(NamedTuple):
    """A file: its path, and its key, the path below the folder with "/" between names."""

    key: str
    path: str


def files_below(folder: str | os.PathLike, endings: tuple[str, ...]) -> Iterator[Found]:
    """Files of these endings (lower case, with the dot) in a folder and below it, in order of names; one folder's names are in memory.

    Folders behind symbolic links are entered, unless they are one of those above. Names that begin with a dot are left out: system
    files, thumbnails, the halves of macOS ("._a.png").

    Example:
        >>> [found.key for found in files_below("pictures", (".png",))]
        ['fox.png']
    """
    yield from _below(os.fspath(folder), "", endings, (_which(os.fspath(folder)),))


def _which(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _below(folder: str, prefix: str, endings: tuple[str, ...], above: tuple[tuple[int, int], ...]) -> Iterator[Found]:
    with os.scandir(folder) as found:
        inside = sorted((one.name, one.is_dir()) for one in found if not one.name.startswith("."))
    for name, is_folder in inside:
        path = os.path.join(folder, name)
        if not is_folder:
            if name.lower().endswith(endings):
                yield Found(prefix + name, path)
        elif (which := _which(path)) not in above:
            yield from _below(path, f"{prefix}{name}/", endings, (*above, which))
