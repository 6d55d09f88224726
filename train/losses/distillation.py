"""Distillation from a teacher's embeddings: the student's in-batch softmax is brought to the teacher's.

    KL(softmax(teacher_i / teacher_temperature) || softmax(student_i / temperature)) over the batch's targets, mean over rows, in nats

The teacher's vectors are read by row from files of embeddings (`train.losses.teacher`): they may have another width, and the teacher is
not in memory. Targets whose vectors are unknown (rows of sources that are not distilled, or that cannot be read) are zero vectors on
both sides, whose logit is 0 to student and teacher alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from contrastive_kernels import distillation_loss

from .base import Loss, LossBatch
from .copies import Matryoshka, Quantised, check_copies, check_copies_width, with_copies
from .teacher import TeacherVectors, teacher_vectors

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
    student, teacher = torch.where(columns[:, None], target, 0), torch.where(columns[:, None], teacher_target, 0)
    if len(target) == len(query):
        options["weight"] = rows.to(torch.promote_types(query.dtype, torch.float32))
    if group is not None:
        options["group"] = group
    return distillation_loss(torch.where(rows[:, None], query, 0), student, teacher_query, teacher, normalize=True, **options)


@dataclass
class Distillation(Loss):
    """Rows of the recipe, or of a source, have a teacher's vectors in the files of `teacher`.

    symmetric: the mean with the softmax of each target over the queries. workspace_mib, backend: of the operator.
    """

    teacher: Teacher | None = None
    name: str = "distillation"
    temperature: float = 0.02
    teacher_temperature: float = 0.02
    symmetric: bool = False
    workspace_mib: float | None = None
    backend: str = "auto"
    matryoshka: Matryoshka | None = None
    quantised: Quantised | None = None

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
        for vectors in self._vectors():
            vectors.of(places, [False] * len(places))

    def function(self) -> Callable:
        return with_copies(distillation, self.matryoshka, self.quantised)

    def options(self, batch: LossBatch) -> dict[str, Any]:
        known = torch.ones_like(batch.query_ids, dtype=torch.bool) if batch.rows is None else batch.rows
        options = {"known": known, "temperature": self.temperature, "teacher_temperature": self.teacher_temperature}
        if batch.planned:
            both = [torch.zeros(len(known), _PLANNED_WIDTH, device=known.device)] * 2
        else:
            absent = (~known | (batch.query_ids < 0)).tolist()
            both = [vectors.of(batch.places, absent).to(known.device) for vectors in self._vectors()]
        options |= {"teacher_query": both[0], "teacher_target": both[1]}
        said = {name: getattr(self, name) for name in ("symmetric", "workspace_mib", "backend")}
        options |= {name: value for name, value in said.items() if value not in (None, False, "auto")}
        return options if batch.group is None else {**options, "group": batch.group}

    def _vectors(self) -> tuple[TeacherVectors, TeacherVectors]:
        return tuple(teacher_vectors(path, self.source_names) for path in (self.teacher.query, self.teacher.target))

    def figures(self, function: Callable) -> dict[str, float]:
        return {"temperature": self.temperature}

    def words(self) -> str:
        return f"by distillation from embeddings of {self.teacher.query} at temperature {self.temperature:g}"
