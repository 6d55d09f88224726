"""WebDataset shards: samples of plain tar files, found once and read by number from then on.

A sample is a run of files of one key (the path up to the first dot of the name); its columns are their endings: `jpg`, `txt`, `json`
with its values as `json.caption`, and `__key__`. Endings of texts give texts, `json` its value, others the file's bytes.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm2vec.data.tables.bytes_at import BytesAt
from vlm2vec.data.tables.cache import cached
from vlm2vec.data.tables.table import Table
from vlm2vec.files.documents import parse_json, require_regular

KEY = "__key__"
TEXTS = ("txt", "text", "caption", "cls", "cls2", "index", "inx", "id", "transcript")


class Shard:
    """One tar file. A sample that the file was cut off in keeps its row, which says so."""

    def __init__(self, path: str):
        require_regular(path)
        self._name, self._file, self._size = os.path.basename(path), BytesAt(path), os.path.getsize(path)
        index = np.load(cached(path, ".npz", "tar", lambda part: _write_index(path, part)), allow_pickle=False)
        self._keys, self._first = index["keys"], index["first"]
        self._endings, self._ending, self._offsets, self._sizes = (index[name] for name in ("endings", "ending", "offsets", "sizes"))

    def __len__(self) -> int:
        return len(self._keys)

    def endings(self) -> list[str]:
        """Those of all samples, in the order in which they first occur."""
        return self._endings.tolist()

    def read(self, row: int, columns: Sequence[str] | None) -> dict[str, Any]:
        key = str(self._keys[row])
        values: dict[str, Any] = {KEY: key}
        for at in range(self._first[row], self._first[row + 1]):
            ending = str(self._endings[self._ending[at]])
            if columns is not None and ending not in columns:
                continue
            where, offset, size = f"{self._name}, {key}.{ending}", int(self._offsets[at]), int(self._sizes[at])
            if offset + size > self._size:
                raise ValueError(f"{where}: the shard is cut off; copy it again")
            if ending in values:
                raise ValueError(f"{where}: twice in one sample; give each a key of its own")
            values[ending] = _value(ending, self._file.read(offset, size), where)
        return values


def _value(ending: str, content: bytes, where: str) -> Any:
    if ending not in TEXTS and ending.rpartition(".")[2] != "json":
        return content
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error.reason} at byte {error.start}); write it as UTF-8") from error
    return text if ending in TEXTS else parse_json(text, where)


class Joined:
    """Readers one behind the other."""

    def __init__(self, readers: Sequence[Any]):
        self._readers = list(readers)
        self._first = np.cumsum([0] + [len(reader) for reader in self._readers])

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, row: int, columns: Sequence[str] | None) -> dict[str, Any]:
        which = int(np.searchsorted(self._first, row, side="right")) - 1
        return self._readers[which].read(row - int(self._first[which]), columns)


def open_shards(paths: Sequence[str]) -> Table:
    """Tar files in this order.

    Raises:
        ValueError: names the file: compressed (which can only be read from its start), damaged, without samples.
    """
    shards = [Shard(path) for path in paths]
    columns = dict.fromkeys(ending for shard in shards for ending in shard.endings())
    if not columns:
        raise ValueError(f"{paths[0]}: no samples; expected files such as 000001.jpg and 000001.txt in it")
    return Table(Joined(shards), [KEY, *columns], None)


def _write_index(path: str, part: Path) -> None:
    keys, first, endings, ending, offsets, sizes = [], [], {}, [], [], []
    for key, kind, offset, size in _members(path):
        if not keys or keys[-1] != key:
            keys.append(key)
            first.append(len(ending))
        ending.append(endings.setdefault(kind, len(endings)))
        offsets.append(offset)
        sizes.append(size)
    with open(part, "wb") as file:
        np.savez(
            file,
            keys=np.array(keys, dtype=str),
            first=np.array([*first, len(ending)], dtype=np.int64),
            endings=np.array(list(endings), dtype=str),
            ending=np.array(ending, dtype=np.int32),
            offsets=np.array(offsets, dtype=np.int64),
            sizes=np.array(sizes, dtype=np.int64),
        )


def _members(path: str) -> Iterator[tuple[str, str, int, int]]:
    """(key, ending, offset, size) of the files in a tar; a last one that is cut off too."""
    with open(path, "rb") as file:
        head = file.read(6)
    if head[:2] == b"\x1f\x8b" or head[:3] == b"BZh" or head == b"\xfd7zXZ\0" or head[:4] == b"\x28\xb5\x2f\xfd":
        raise ValueError(f"{path} is compressed and can be read from its start alone; expected a plain tar: decompress it")
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0:  # the walk would go back
                    raise ValueError(f"{path}: damaged, {member.name[:60]!r} has a size below 0; copy it again")
                folder, slash, name = member.name.rpartition("/")
                stem, dot, ending = name.partition(".")
                if member.isreg() and dot and stem and not stem.startswith("__"):
                    yield folder + slash + stem, ending.lower(), member.offset_data, member.size
                tar.members = []  # tarfile would keep every header
    except tarfile.ReadError as error:
        if "unexpected end of data" not in str(error):  # of its last file, which was told above
            raise ValueError(f"{path} cannot be read as a tar file ({str(error)[:200]}); copy it again") from error
