"""One loaded task: what is encoded, what is ranked against what, and what is right."""

from __future__ import annotations

from collections.abc import Callable, Hashable
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
    is the folder that image paths are made relative to in the files.
    """

    task: Task
    queries: list = field(default_factory=list)
    candidates: list = field(default_factory=list)
    names: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    label_names: list = field(default_factory=list)
    grades: list | None = None
    local: list | None = None
    media: str = ""
    problems: Problems = field(default_factory=Problems)


def unreadable(reason: str) -> dict[str, Any]:
    """A model input that stands for a row's which cannot be had: it is told and counted, and its row is wrong."""
    return {"text": "", "image": None, "unreadable": reason, "row": True}


def asked(template: str, text: str | None, row: int, what: str) -> dict[str, Any]:
    """A query of `template` around a text, or what stands for one whose text is null or blank."""
    return {"text": template.replace("{text}", text)} if text and text.strip() else unreadable(f"row {row}: no {what}")


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
