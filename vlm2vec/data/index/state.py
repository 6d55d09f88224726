"""An index at one moment: what its `index.json` names, read whole or written whole.

    INDEX/index.json                    the folder indexed, the model, the names of the files below; replaced last, in one rename
    INDEX/rows-{digest}.parquet         key, kind, stamp, content, file and text of each row, in the order of the vectors
    INDEX/vectors-{digest}.safetensors  see `segments`

Files are written once under names of their own. Whoever reads `index.json` finds what it names, an update or a kill notwithstanding;
what no `index.json` names any more goes with the next update.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm2vec.data.index.segments import PREFIX, SUFFIX, Segment, open_segment
from vlm2vec.files import PART, write_bytes, write_json
from vlm2vec.files.documents import kind, read_object

MANIFEST = "index.json"
FORMAT = 1
TRIES = 20  # an update may take files away between the reading of index.json and of what it names
COLUMNS = ("key", "kind", "stamp", "content", "file", "text")


@dataclass(frozen=True)
class Row:
    """One vector's entry.

    Attributes:
        key: what a search answers with.
        kind: "image", "video", "text" or "row".
        stamp, content: of `entries.Entry`; the digest of its content.
        file: a file to be shown, "" for none; below the folder indexed where it lies there. text: to be shown.
    """

    key: str
    kind: str
    stamp: str
    content: bytes
    file: str = ""
    text: str = ""


@dataclass(frozen=True)
class State:
    """What an index holds. Never changed: an update makes another."""

    about: dict[str, Any]
    rows: list[Row]
    segments: list[Segment]
    signature: tuple = ()
    starts: list[int] = field(default_factory=list)  # of the segments, among the rows

    def __len__(self) -> int:
        return len(self.rows)


def signature(folder: Path) -> tuple:
    """Tells whether `index.json` was replaced; () where there is none."""
    try:
        found = os.stat(folder / MANIFEST)
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def is_index(path: str | os.PathLike) -> bool:
    """Whether a folder holds an index."""
    return os.path.isfile(os.path.join(path, MANIFEST))


def read_state(folder: Path, verify: bool = True) -> State:
    """The index as its last update left it.

    Args:
        verify: read all vectors and compare them with their checksums.

    Raises:
        ValueError: no index there, of another release's layout, or damaged.
    """
    for turn in range(TRIES):
        now = signature(folder)
        if not now:
            raise ValueError(f"{folder}: no index in it; make one with vlm2vec index DIR -o {folder}")
        about = read_object(folder / MANIFEST)
        if about.get("format") != FORMAT:
            raise ValueError(f"{folder / MANIFEST}: format {kind(about.get('format'))}, expected {FORMAT}; make the index again")
        try:
            rows = _read_rows(folder / about["rows"], about["rows"])
            segments = [open_segment(folder, name, verify=verify) for name in about["segments"]]
        except FileNotFoundError as e:
            if signature(folder) == now and turn > 1:
                raise ValueError(
                    f"{folder}: {os.path.basename(e.filename or 'one of its files')} is gone; remove the index and make it again"
                ) from e
            time.sleep(0.01 * turn)
            continue
        starts = [0]
        for segment in segments:
            starts.append(starts[-1] + len(segment.vectors))
        if starts[-1] != len(rows):
            raise ValueError(f"{folder}: {starts[-1]} vectors for {len(rows)} rows; remove the index and make it again")
        return State(about, rows, segments, now, starts)
    raise ValueError(f"{folder}: is being replaced again and again; read it when the updates are done")


def write_state(folder: Path, about: dict[str, Any], rows: list[Row], segments: list[str]) -> None:
    """Make this the index. The segments are on disk by now; `index.json` comes last, and what it does not name goes after it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: [getattr(row, name) for row in rows] for name in COLUMNS}, schema=_schema())
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    name = f"rows-{_digest(content)}.parquet"
    write_bytes(folder / name, content)
    write_json(folder / MANIFEST, {**about, "format": FORMAT, "count": len(rows), "rows": name, "segments": segments})
    for path in unnamed(folder, {name, *segments}):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def unnamed(folder: Path, named: set[str]) -> list[Path]:
    """Files of an index that are none of `named`: what an update replaced, or one that was killed left."""
    ours = [*folder.glob(f"{PREFIX}*{SUFFIX}"), *folder.glob("rows-*.parquet"), *folder.glob(f"*{PART}")]
    return sorted(path for path in ours if path.name not in named)


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([(name, pa.binary() if name == "content" else pa.string()) for name in COLUMNS])


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def _read_rows(path: Path, name: str) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = path.read_bytes()  # once: an update may take the file away
    if name != f"rows-{_digest(content)}.parquet":
        raise ValueError(f"{path} is damaged (its content is not what was written); remove the index and make it again")
    try:
        table = pq.read_table(pa.BufferReader(content), schema=_schema())
    except (pa.ArrowInvalid, OSError) as e:
        raise ValueError(f"{path} does not read back ({json.dumps(str(e)[:200])}); remove the index and make it again") from e
    return [Row(*row) for row in zip(*(table.column(column).to_pylist() for column in COLUMNS))]
