"""Distillation from a teacher's embeddings: the student's in-batch softmax is brought to the teacher's.

    KL(softmax(teacher_i / teacher_temperature) || softmax(student_i / temperature)) over the batch's targets, mean over rows, in nats

The teacher's vectors are read by row from files of embeddings (`train.losses.teacher`): they may have another width, and the teacher is
not in memory. Rows whose vectors are unknown (of sources that are not distilled, that cannot be read, or that the files lack) are left out,
and their targets are nobody's candidates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist

from contrastive_kernels import distillation_loss

from ..command import COMMAND
from .base import Loss, LossBatch
from .copies import Matryoshka, Quantised, check_copies, check_copies_width, with_copies
from .teacher import TeacherVectors, teacher_vectors

logger = logging.getLogger(__name__)

_PLANNED_WIDTH = 1024  # of a teacher whose files a plan has not at hand


@dataclass
class Teacher:
    """Files of a teacher's embeddings, a vector for each row: `python -m train teach` or `vlm2vec embed` writes them."""

    query: str
    target: str


def distillation(
    query: torch.Tensor,
    target: torch.Tensor,
    *,
    teacher_query: torch.Tensor,
    teacher_target: torch.Tensor,
    known: torch.Tensor,
    query_mask: torch.Tensor | None = None,
    target_mask: torch.Tensor | None = None,
    positives: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> torch.Tensor:
    """`contrastive_kernels.distillation_loss` of the rows that are known and readable; 0-d.

    Args:
        query, target: (N, D), not normalised. teacher_query, teacher_target: (N, Dt). known: (N,) bool.
    """
    rows = known if query_mask is None else known & query_mask & target_mask
    columns = rows if positives is None else rows.repeat(len(target) // len(rows))  # a plan's targets of all ranks
    if group is not None:
        options["group"] = group
    masks = {"query_mask": rows, "target_mask": columns}
    return distillation_loss(query, target, teacher_query, teacher_target, normalize=True, **masks, **options)


@dataclass
class Distillation(Loss):
    """Rows of the recipe, or of a source, have a teacher's vectors in the files of `teacher`.

    A row that a file lacks does not count; the first is told in the log, and `untaught` counts them. With `data.strict` it raises.
    symmetric: the mean with the softmax of each target over the queries. workspace_mib, backend: of the operator.
    """

    untaught: ClassVar[int] = 0

    teacher: Teacher | None = None
    name: str = "distillation"
    temperature: float = 0.02
    teacher_temperature: float = 0.02
    symmetric: bool = False
    workspace_mib: float | None = None
    backend: str = "auto"
    matryoshka: Matryoshka | None = None
    quantised: Quantised | None = None

    @property
    def tells_sources(self) -> bool:
        return True

    def check(self) -> None:
        if self.teacher is None:
            raise ValueError(
                "loss.teacher: expected {query: FILE, target: FILE} of a teacher's embeddings, got none; train teach makes them"
            )
        for key in ("temperature", "teacher_temperature"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"loss.{key} must be above 0, got {getattr(self, key)}; it divides cosines, and 0.02 is usual")
        check_copies(self)

    def check_width(self, width: int, model: str) -> None:
        check_copies_width(self, width, model)

    def check_rows(self, places: Sequence[tuple[int, int]]) -> None:
        lacking: dict[int, list[int]] = {source: [] for source, _ in places}
        for place, found in zip(places, self._found(places)[1], strict=True):
            if not found:
                lacking[place[0]].append(place[1])
        for source, rows in lacking.items():
            count = sum(place[0] == source for place in places)
            if 2 * len(rows) > count or (self.strict and rows):
                raise ValueError(
                    f"{self._lacking(source, rows[0])}, as for {len(rows)} of {count} rows; make the files anew with "
                    f"{COMMAND} teach RECIPE --teacher MODEL -o FOLDER"
                )

    def function(self) -> Callable:
        return with_copies(distillation, self.matryoshka, self.quantised)

    def options(self, batch: LossBatch) -> dict[str, Any]:
        device = batch.query_ids.device
        known = torch.ones_like(batch.query_ids, dtype=torch.bool) if batch.rows is None else batch.rows
        if batch.planned:
            both = [torch.zeros(len(known), _PLANNED_WIDTH, device=device)] * 2
        else:
            at, found = self._found(batch.places)
            self._tell(batch, found)
            known = known & torch.from_numpy(found).to(device)
            both = [vectors.read(np.where(found, each, -1)).to(device) for vectors, each in zip(self._vectors(), at, strict=True)]
        options = {"known": known, "temperature": self.temperature, "teacher_temperature": self.teacher_temperature}
        options |= {"teacher_query": both[0], "teacher_target": both[1]}
        said = {name: getattr(self, name) for name in ("symmetric", "workspace_mib", "backend")}
        options |= {name: value for name, value in said.items() if value not in (None, False, "auto")}
        return options if batch.group is None else {**options, "group": batch.group}

    def _vectors(self) -> tuple[TeacherVectors, TeacherVectors]:
        return tuple(teacher_vectors(path, self.source_names) for path in (self.teacher.query, self.teacher.target))

    def _found(self, places: Sequence[tuple[int, int]]) -> tuple[list[np.ndarray], np.ndarray]:
        """([places in the query file, in the target file], (N,) bool: in both) of rows."""
        at = [vectors.places(places) for vectors in self._vectors()]
        return at, (at[0] >= 0) & (at[1] >= 0)

    def _lacking(self, source: int, row: int) -> str:
        vectors = next(vectors for vectors in self._vectors() if vectors.places([(source, row)])[0] < 0)
        key = vectors.key(source, row)
        return f"{vectors.path}: expected a vector for row {row} of {self.source_names[source]} (key {key!r}), got none"

    def _tell(self, batch: LossBatch, found: np.ndarray) -> None:
        lacking = ~found if batch.counted is None else ~found & batch.counted
        if not lacking.any():
            return
        words = self._lacking(*batch.places[int(lacking.argmax())])
        if self.strict:
            raise ValueError(f"{words}; make the files anew with {COMMAND} teach, or set data.strict to false to leave such rows out")
        if not self.untaught:
            logger.warning("%s; it does not count in the distillation, nor do others like it (untaught counts them)", words)
        self.untaught += int(lacking.sum())

    def figures(self, function: Callable) -> dict[str, float]:
        return {"temperature": self.temperature} | ({"untaught": float(self.untaught)} if self.untaught else {})

    def words(self) -> str:
        return f"by distillation from embeddings of {self.teacher.query} at temperature {self.temperature:g}"
