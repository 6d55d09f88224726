"""Streamed inputs to a folder of shards, by one process or by the ranks of torchrun.

Input i belongs to shard i // rows, and shard s to rank s % world. Every rank reads all inputs' rows, knows by their digests which shards
are of the inputs as they are, and embeds its own. So ranks exchange nothing, may die alone, and another number of them goes on where they
stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlm2vec.data.bulk.shards import COMPLETE, SETTINGS, Shard, numbers, shard_name, told_inputs, write_shard
from vlm2vec.files import PART, write_json
from vlm2vec.files.documents import read_object

Encode = Callable[[Iterable[Any]], Iterator[tuple[torch.Tensor, dict[int, str]]]]  # as `encoding.encode_stream`


@dataclass
class Done:
    """What a rank did.

    Attributes:
        rows: inputs in all, of every rank. made: inputs that this rank embedded now. kept: those of its shards that were there.
        bad: inputs that could not be read, of this run. left_out: {key: why} of them, one for inputs of one key.
    """

    rows: int = 0
    made: int = 0
    kept: int = 0
    bad: int = 0
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass
class _Plan:
    """What the reading thread tells the writing one."""

    rows: int
    rank: int
    world: int
    there: dict[int, str]
    total: int = 0
    digests: dict[int, Any] = field(default_factory=dict)
    taken: deque = field(default_factory=deque)  # (shard, key) of inputs that are handed over and not answered

    def count(self, shard: int) -> int:
        """Inputs of a shard, once all are known."""
        return min(self.rows, self.total - shard * self.rows)

    def own(self) -> list[int]:
        """The shards of this rank."""
        return [shard for shard in self.digests if shard % self.world == self.rank]

    def wanted(self, inputs: Iterable[tuple[str, Any]]) -> Iterator[Any]:
        """The inputs that are to be embedded."""
        for key, x in inputs:
            shard = self.total // self.rows
            self.total += 1
            self.digests.setdefault(shard, hashlib.blake2b(digest_size=16)).update(_told(key, x))
            if shard % self.world != self.rank or shard in self.there:
                continue
            self.taken.append((shard, key))
            yield x


def _told(key: str, x: Any) -> bytes:
    """What an input is, as far as its row says: files by their names, bytes by their digest."""

    def plain(value: Any) -> Any:
        return hashlib.blake2b(value, digest_size=16).hexdigest() if isinstance(value, bytes) else os.fspath(value)

    return json.dumps([key, x], sort_keys=True, default=plain).encode() + b"\n"


def settle(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new folder, or hold those of an old one to them.

    Raises:
        ValueError: other settings, by their names, or a folder of something else.
    """
    path = folder / SETTINGS
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        made = read_object(path)
        other = [name for name in settings if made.get(name) != settings[name]]
        if other:
            raise ValueError(f"{folder} was made with other {', '.join(other)}; give the same, or name another folder")
        return
    if folder.is_dir() and any(not name.startswith(".lock") and not name.endswith(PART) for name in os.listdir(folder)):
        raise ValueError(f"{folder} holds other files and no {SETTINGS}; name a new folder")
    write_json(path, settings)


def embed_shards(
    inputs: Callable[[], Iterable[tuple[str, Any]]],
    folder: Path,
    encode: Encode,
    *,
    rows: int,
    kind: str,
    about: dict[str, str],
    rank: int = 0,
    world: int = 1,
) -> Done:
    """Embed (key, input) pairs into the shards of this rank; those that are there, of the same inputs, are not made again.

    Args:
        inputs: begins the stream of them; a second time where shards are of other inputs than they were.
        folder: after `settle`.
        encode: inputs to vectors and what cannot be read, in order.
        rows: inputs of a shard. kind: "safetensors" or "parquet".
        about: what each shard's metadata says besides.

    Raises:
        ValueError: as `inputs` and `encode`.
    """
    there, done = numbers(folder), Done()
    while True:
        plan = _Plan(rows, rank, world, there)
        _one_pass(plan, inputs(), folder, encode, kind, about, done)
        changed = [shard for shard in plan.own() if shard in there and not _is_of(folder / there[shard], plan.digests[shard].hexdigest())]
        if not changed:
            break
        there = {shard: name for shard, name in numbers(folder).items() if shard not in changed}
    done.rows = plan.total
    done.kept = sum(plan.count(shard) for shard in plan.own()) - done.made - done.bad
    _complete(folder, plan)
    return done


def _is_of(path: Path, digest: str) -> bool:
    """Whether a shard is of these inputs, and whole."""
    try:
        return told_inputs(path) == digest
    except ValueError:
        return False


def _one_pass(
    plan: _Plan, inputs: Iterable[tuple[str, Any]], folder: Path, encode: Encode, kind: str, about: dict[str, str], done: Done
) -> None:
    """Embed what the plan lacks, and write each shard when its last vector is made: one shard's vectors are in memory."""
    now: int | None = None
    keys: list[str] = []
    vectors: list[torch.Tensor] = []
    left: dict[int, str] = {}

    def write() -> None:
        good = [place for place in range(len(keys)) if place not in left]
        shard = Shard(
            [keys[place] for place in good],
            torch.cat(vectors)[good],
            plan.digests[now].hexdigest(),
            {keys[place]: why for place, why in left.items()},
        )
        (folder / COMPLETE).unlink(missing_ok=True)  # it tells of the shards that were
        write_shard(folder / shard_name(now, kind), shard, about)
        done.made += len(good)
        done.bad += len(left)
        done.left_out.update(shard.left_out)

    for some, bad in encode(plan.wanted(inputs)):
        start = 0
        while start < len(some):
            shard = plan.taken[0][0]
            if shard != now:
                if now is not None:
                    write()
                now, keys, vectors, left = shard, [], [], {}
            end, first = start, len(keys)
            while end < len(some) and plan.taken[0][0] == shard:
                keys.append(plan.taken.popleft()[1])
                end += 1
            left.update({first + row - start: why for row, why in bad.items() if start <= row < end})
            vectors.append(some[start:end])
            start = end
    if now is not None:
        write()


def _complete(folder: Path, plan: _Plan) -> None:
    """Say that all is there, by whichever rank sees it: every shard, each of the inputs as they are now, whoever made it.

    Shards beyond the last, of a run with more inputs, go.
    """
    there, digests = numbers(folder), {number: digest.hexdigest() for number, digest in sorted(plan.digests.items())}
    if not all(number in there and _is_of(folder / there[number], digest) for number, digest in digests.items()):
        return
    told = {"inputs": plan.total, "shards": [there[number] for number in digests], "digests": list(digests.values())}
    if set(there) == set(digests) and (folder / COMPLETE).is_file() and read_object(folder / COMPLETE) == told:
        return
    (folder / COMPLETE).unlink(missing_ok=True)
    for number in set(there) - set(digests):
        (folder / there[number]).unlink(missing_ok=True)
    write_json(folder / COMPLETE, told)
