"""One update of an index: what is new, changed or gone, by the least reading and embedding that tells."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vlm2vec.data.index.entries import Entry
from vlm2vec.data.index.segments import ROWS, SegmentWriter, open_segment
from vlm2vec.data.index.state import Row, State, unnamed

BLOCK = 512  # inputs, or vectors, that are handled together
Some = tuple[torch.Tensor, dict[int, str]]  # ((n, D) vectors, {place: why it cannot be read}) of the next n inputs
Encode = Callable[[list[Any]], Some]
Stream = Callable[[Iterator[Any]], Iterator[Some]]  # as `encoding.encode_stream`: inputs are read ahead while the model runs


def in_blocks(encode: Encode) -> Stream:
    """A stream of an `encode` that takes lists, `BLOCK` inputs at a time."""

    def stream(inputs: Iterator[Any]) -> Iterator[Some]:
        while some := list(islice(inputs, BLOCK)):
            yield encode(some)

    return stream


@dataclass
class Changes:
    """What an update did.

    Attributes:
        added, changed, removed, kept: numbers of entries.
        embedded: inputs that the model embedded; fewer than added and changed where files were moved or copied.
        left_out: {key: why} of entries that cannot be read, where they were left out. changed_keys: those of `changed`.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    kept: int = 0
    embedded: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    changed_keys: set[str] = field(default_factory=set, repr=False)

    def leave_out(self, key: str, why: str) -> None:
        """An entry that was to be embedded cannot be: it is not added, or what was there of it goes."""
        self.left_out[key] = why
        if key in self.changed_keys:
            self.changed, self.removed = self.changed - 1, self.removed + 1
        else:
            self.added -= 1

    def __str__(self) -> str:
        told = f"{self.added} added, {self.changed} changed, {self.removed} removed, {self.kept} kept"
        return told + (f", {len(self.left_out)} left out" if self.left_out else "")


@dataclass
class Plan:
    """What is to be done, known before a model is needed.

    Attributes:
        kept: the row of each key that stays, with its present stamp. fresh: entries whose vectors are to be had, with their digests.
        stamps: whether a stamp is another one than was written.
    """

    changes: Changes
    kept: dict[str, Row] = field(default_factory=dict)
    fresh: list[tuple[Entry, bytes]] = field(default_factory=list)
    stamps: bool = False

    @property
    def idle(self) -> bool:
        """Nothing to write."""
        done = self.changes
        return not (self.fresh or done.removed or self.stamps)


def plan(found: Iterable[Entry], old: State | None, skip_bad: bool) -> Plan:
    """Compare what lies there with what the index holds.

    Raises:
        ValueError: a file that cannot be read, by its key, unless `skip_bad`.
    """
    known = {row.key: row for row in old.rows} if old is not None else {}
    made, looked = Plan(Changes()), []
    for entry in found:
        row = known.get(entry.key)
        if row is not None and row.stamp and row.stamp == entry.stamp and row.kind == entry.kind:
            made.kept[entry.key] = row
        else:
            looked.append(entry)
    for entry, content in _contents(looked):
        row = known.get(entry.key)
        if isinstance(content, str):
            if not skip_bad:
                raise unreadable(entry.key, content)
            made.changes.left_out[entry.key] = content
        elif row is not None and (row.content, row.kind) == (content, entry.kind):
            made.kept[entry.key] = replace(row, stamp=entry.stamp)
            made.stamps |= entry.stamp != row.stamp
        else:
            made.fresh.append((entry, content))
            if row is not None:
                made.changes.changed += 1
                made.changes.changed_keys.add(entry.key)
    made.changes.kept = len(made.kept)
    made.changes.added = len(made.fresh) - made.changes.changed
    made.changes.removed = len(known) - made.changes.kept - made.changes.changed
    return made


def _contents(looked: list[Entry]) -> Iterator[tuple[Entry, bytes | str]]:
    """Each entry with the digest of its content, or why it cannot be read."""

    def one(entry: Entry) -> bytes | str:
        try:
            return entry.content()
        except ValueError as e:
            return str(e)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(looked), BLOCK):
            block = looked[start : start + BLOCK]
            yield from zip(block, pool.map(one, block))


class _Known:
    """Vectors that are there by the digest of their content: the index's own, and those of an update that was killed."""

    def __init__(self, folder: Path, old: State | None, identity: str):
        segments = list(old.segments) if old is not None else []
        for path in unnamed(folder, {segment.name for segment in segments}):
            try:
                segments.append(open_segment(folder, path.name, identity))
            except (ValueError, OSError):  # no vectors, half of a file, or another model's
                continue
        self._places = {content: (segment.vectors, i) for segment in segments for i, content in enumerate(segment.contents)}

    def __contains__(self, content: bytes) -> bool:
        return content in self._places

    def get(self, contents: list[bytes]) -> torch.Tensor:
        return torch.stack([self._places[content][0][self._places[content][1]] for content in contents])


def apply(
    made: Plan, folder: Path, old: State | None, stream: Stream, identity: str, *, skip_bad: bool, progress: bool | None = None
) -> tuple[list[Row], list[str]]:
    """Write the vectors that the plan asks for. Gives (rows, names of segments) of the new index, which nobody sees yet.

    Args:
        stream: called once, with the inputs that are not known by their content; it reads them as it needs them.
        identity: the model's digest.
    """
    rows: list[Row] = []
    names: list[str] = []

    def written(name: str, its: list[Row]) -> None:
        names.append(name)
        rows.extend(its)

    writer = SegmentWriter(folder, identity, written)
    for start, segment in zip(old.starts, old.segments) if old is not None else ():
        its = [made.kept.get(row.key) for row in old.rows[start : start + len(segment.vectors)]]
        live = [i for i, row in enumerate(its) if row is not None]
        if len(live) == len(its) and (len(its) == ROWS or not made.fresh):
            written(segment.name, its)
        elif live:
            writer.add(segment.vectors[live], [its[i].content for i in live], [its[i] for i in live])
    _add(made, _Known(folder, old, identity), stream, writer, skip_bad, progress)
    writer.close()
    return rows, names


def _add(made: Plan, known: _Known, stream: Stream, writer: SegmentWriter, skip_bad: bool, progress: bool | None) -> None:
    """Embed what of the fresh entries is not known, each content once, and hand all of them to the writer."""
    from tqdm.auto import tqdm

    there: list[tuple[Entry, bytes]] = []
    asked: dict[bytes, list[Entry]] = {}
    for entry, content in made.fresh:
        if content in known:
            there.append((entry, content))
        else:
            asked.setdefault(content, []).append(entry)
    show = len(made.fresh) > BLOCK and sys.stderr.isatty() if progress is None else progress
    with tqdm(total=len(made.fresh), desc="index", unit="input", disable=not show) as bar:
        for start in range(0, len(there), BLOCK):
            some = there[start : start + BLOCK]
            writer.add(known.get([content for _, content in some]), [content for _, content in some], [_row(*one) for one in some])
            bar.update(len(some))
        coming = iter(asked.items())
        for vectors, bad in stream(of_one[0].as_input() for of_one in asked.values()) if asked else ():
            some, places = [], []
            for place, (content, of_one) in enumerate(islice(coming, len(vectors))):
                if place in bad and not skip_bad:
                    raise unreadable(of_one[0].key, bad[place])
                for entry in of_one:
                    if place in bad:
                        made.changes.leave_out(entry.key, bad[place])
                    else:
                        some.append((entry, content))
                        places.append(place)
            if some:
                writer.add(vectors[places], [content for _, content in some], [_row(*one) for one in some])
            made.changes.embedded += len(vectors) - len(bad)
            bar.update(len(some))


def _row(entry: Entry, content: bytes) -> Row:
    file, text = entry.shown()
    return Row(entry.key, entry.kind, entry.stamp, content, file, text)


def unreadable(key: str, why: str) -> ValueError:
    """The error of an entry that cannot be read."""
    return ValueError(f"{why if key in why else f'{key}: {why}'}; mend it, or say --skip-bad")
