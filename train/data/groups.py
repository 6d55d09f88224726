"""Rows that belong together: held out together, and no negatives of each other."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from .sources import SourceTable

logger = logging.getLogger(__name__)

NO_GROUP = -1


def group_id(column: str, group: str | None) -> int:
    """The same non-negative 63-bit number for the same group of a column, on every rank and in every run; -1 for none."""
    if group is None:
        return NO_GROUP
    return int.from_bytes(hashlib.blake2b(f"{column}\0{group}".encode("utf-8", "replace"), digest_size=8).digest(), "little") >> 1


class Split:
    """The rows of a source by position: those trained on first, then those held out.

    Attributes:
        trained, held: how many.
    """

    def __init__(self, rows: int, held: int | np.ndarray):
        """held: how many of the last rows, or (rows,) bool of those held out."""
        self._order = None
        if isinstance(held, np.ndarray):
            self._order = np.concatenate([np.flatnonzero(~held), np.flatnonzero(held)])
            held = int(held.sum())
        self.trained, self.held = rows - held, held

    def row(self, position: int) -> int:
        """The row of the source at a position."""
        return position if self._order is None else int(self._order[position])


def split(tables: Sequence[SourceTable], names: Sequence[str], rows: int) -> list[Split]:
    """What is held out of each source: at most `rows` and a tenth of it, the last ones; of a source with groups the last whole groups
    that fit. A group that is held out in one source is so in all whose groups are of the same column."""
    if not any(table.group for table in tables) or not rows:
        return [Split(len(table), min(rows, len(table) // 10)) for table in tables]
    groups = [table.groups() if table.group else None for table in tables]
    held: dict[str, set[str]] = {table.group: set() for table in tables if table.group}
    for table, name, of in zip(tables, names, groups):
        if of is None:
            continue
        most = min(rows, len(table) // 10)
        chosen = _last_groups(of, most)
        held[table.group] |= chosen
        if most and not chosen:
            logger.warning("source %s: no group of column %r has %d rows or fewer, so none is held out", name, table.group, most)
    splits = []
    for table, of in zip(tables, groups):
        if of is None:
            splits.append(Split(len(table), min(rows, len(table) // 10)))
            continue
        splits.append(Split(len(table), np.array([group in held[table.group] for group in of], dtype=bool)))
    return splits


def _last_groups(groups: list[str | None], most: int) -> set[str]:
    """Groups, from the last row on, of which together no more than `most` rows are. Rows without a group are trained on."""
    sizes, chosen, count = Counter(groups), set(), 0
    for group in reversed(groups):
        if count >= most:
            break
        if group is not None and group not in chosen and count + sizes[group] <= most:
            chosen.add(group)
            count += sizes[group]
    return chosen


def joined_ids(contents: np.ndarray, groups: np.ndarray, hard: np.ndarray | None, among: dist.ProcessGroup | None, device: torch.device):
    """(target ids, ids of hard negatives) that are equal where contents are, or where rows share a group, or both in turn.

    Args:
        contents: (N,) ids of the targets' contents. groups: (N,) ids of the rows' groups, -1 for none. hard: (H,) contents, or None.
        among: the ranks over which the batch is spread: what joins two contents may lie on another one. Collective.
    """
    everyone = contents, groups
    if among is not None:
        mine = torch.from_numpy(np.stack([contents, groups])).to(device)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(among))]
        dist.all_gather(parts, mine, group=among)
        everyone = torch.cat(parts, dim=1).cpu().numpy()
    names, place = np.unique(everyone[0], return_inverse=True)
    joined = np.arange(len(names))
    named = everyone[1] != NO_GROUP
    which = np.unique(everyone[1][named], return_inverse=True)[1]
    place = place[named]
    while len(place):
        least = np.full(which.max() + 1, len(names))
        np.minimum.at(least, which, joined[place])
        before = joined.copy()
        np.minimum.at(joined, place, least[which])
        if (joined == before).all():
            break

    def of(ids: np.ndarray) -> np.ndarray:
        at = np.searchsorted(names, ids).clip(max=len(names) - 1)
        return np.where(names[at] == ids, names[joined[at]], ids)

    return of(contents), None if hard is None else of(hard)
