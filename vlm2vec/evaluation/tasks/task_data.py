"""One loaded task: what is encoded, what is ranked against what, and what is right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm2vec.evaluation.tasks import Task
from vlm2vec.evaluation.tasks.problems import Problems


@dataclass
class TaskData:
    """A task read from disk; nothing is decoded yet.

    `queries` and `candidates` are inputs of `model.encode` ({"text":, "image":, "video":}; images are paths). `names`
    identifies candidates in files. `local[i]` lists candidate indices of query i in the data's order, or `local` is
    None when every query sees all candidates. `labels[i]` are candidate indices, -1 for a label that is not among
    them; `label_names[i]` the same as text; `grades[i]` None or one number per label. `media`
    is the folder that image paths are made relative to in the files. `excluded[i]` are candidate indices that the benchmark's
    own score leaves out of query i's ranking (BRIGHT). `parts[i]` names the part that query i belongs to (a language), where a
    task's score is the mean over parts. `held` keeps alive what candidates are read from.
    """

    task: Task
    queries: list = field(default_factory=list)
    candidates: list = field(default_factory=list)
    names: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    label_names: list = field(default_factory=list)
    grades: list | None = None
    local: list | None = None
    excluded: list | None = None
    parts: list | None = None
    held: Any = None
    media: str = ""
    problems: Problems = field(default_factory=Problems)


def unreadable(reason: str) -> dict[str, Any]:
    """A model input that stands for a row's which cannot be had: it is told and counted, and its row is wrong."""
    return {"text": "", "image": None, "unreadable": reason, "row": True}


def asked(template: str, text: str | None, row: int, what: str) -> dict[str, Any]:
    """A query of `template` around a text, or what stands for one whose text is null or blank."""
    return {"text": template.replace("{text}", text)} if text and text.strip() else unreadable(f"row {row}: no {what}")


class Lazy(Mapping):
    """A model input that is made of a row when it is looked at, so that a corpus stays in its file.

    Args:
        rows: a sequence of rows. at: which. make: row -> {"text":, "image":, ...}.
    """

    __slots__ = ("rows", "at", "make")
    _last = threading.local()  # the input that a thread looked at last: one look at all its keys reads the row once

    def __init__(self, rows: Sequence[Any], at: int, make: Callable[[Any], dict[str, Any]]):
        self.rows, self.at, self.make = rows, at, make

    def read(self) -> dict[str, Any]:
        """The input itself."""
        known = getattr(Lazy._last, "item", None)
        if known is None or known[0] is not self:
            known = Lazy._last.item = (self, self.make(self.rows[self.at]))
        return known[1]

    def __getitem__(self, key: str) -> Any:
        return self.read()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.read())

    def __len__(self) -> int:
        return len(self.read())


def whole(item: Any) -> Any:
    """An input as a dictionary that holds what it is made of; others as they are."""
    return item.read() if isinstance(item, Lazy) else item


def reworded(items: list, change: Callable[[dict[str, Any]], dict[str, Any]]) -> list:
    """The inputs with `change` done to each, to those that are made on demand when they are made."""
    makers: dict[Any, Callable] = {}

    def maker(make):
        return makers.setdefault(make, lambda row: change(make(row)))

    return [Lazy(item.rows, item.at, maker(item.make)) if isinstance(item, Lazy) else change(item) for item in items]


class Pool:
    """Distinct candidates by key, in order of first appearance."""

    def __init__(self):
        self.index = {}
        self.items = []
        self.names = []

    def add(self, key: Hashable, item: dict[str, Any] | Callable[[], dict[str, Any]], name: str | None = None) -> int:
        """Index of the candidate; the first one with a key stands for all."""
        where = self.index.get(key)
        if where is None:
            where = self.index[key] = len(self.items)
            self.items.append(item() if callable(item) else item)
            self.names.append(str(key) if name is None else name)
        return where
