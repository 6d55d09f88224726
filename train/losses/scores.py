"""Distillation from a teacher's scores: each row's positive and own hard negatives, weighed as a reranker weighs them.

    KL(softmax(scores_i / teacher_temperature) || softmax(cos_i / temperature)) over the row's 1 + k documents, mean over rows, in nats

Its gradient is that of the cross-entropy by which Qwen3-VL-Embedding is distilled from its reranker; the two differ by the teacher's
entropy. Every row is a matter of its own rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from .base import Loss, LossBatch, group_mean
from .copies import Matryoshka, Quantised, check_copies, check_copies_width, with_copies


def score_distillation(
    query: torch.Tensor,
    target: torch.Tensor,
    *,
    scores: torch.Tensor,
    temperature: float,
    teacher_temperature: float,
    hard_negatives: torch.Tensor | None = None,
    hard_offsets: torch.Tensor | None = None,
    positives: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
    target_mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Mean over the rows that have scores, 0-d; 0 where none has.

    Args:
        query, target: (N, D), not normalised. hard_negatives: (H, D) packed, with `hard_offsets` (N + 1,).
        scores: (N, 1 + K) of the positive and each hard negative, -inf behind the last, NaN in rows without.
        temperature, teacher_temperature: divide cosines and scores.
        positives: (N,) int64, the target of each query; default its own place.
        query_mask, target_mask: (N,) bool; False leaves a row out.
        group: ranks over which rows are spread; the gradient is world_size times the global loss's.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    target = target if positives is None else target[positives]
    counts = ~scores.isnan().any(dim=1)
    for mask in (query_mask, target_mask):
        if mask is not None:
            counts = counts & mask
    # what does not count may be NaN, whose gradient would be NaN too
    unit, found = (torch.nn.functional.normalize(torch.where(counts[:, None], x, 0).to(dtype), dim=-1) for x in (query, target))
    cosines = [(unit * found).sum(-1, keepdim=True)]
    documents = scores.shape[1] - 1
    if documents and hard_negatives is not None and len(hard_negatives):
        # (N, K) places in the packed negatives; those beyond a row's last stand for nothing, by its scores
        places = hard_offsets[:-1, None] + torch.arange(documents, device=scores.device)
        own = torch.nn.functional.normalize(hard_negatives.to(dtype), dim=-1)[places.clamp(max=len(hard_negatives) - 1)]
        cosines.append((unit[:, None] * own).sum(-1))
    there = scores[:, : 1 if len(cosines) == 1 else None]
    there = torch.where(counts[:, None], there, 0.0).to(dtype)
    is_document = there > -math.inf
    teacher = torch.log_softmax(there / teacher_temperature, dim=1)
    student = torch.log_softmax(torch.where(is_document, torch.cat(cosines, dim=1) / temperature, -math.inf), dim=1)
    terms = torch.where(is_document, teacher.exp() * (torch.where(is_document, teacher, 0.0) - torch.where(is_document, student, 0.0)), 0.0)
    return group_mean(torch.where(counts, terms.sum(1), 0.0), counts, group)


@dataclass
class ScoreDistillation(Loss):
    """Rows bear a teacher's scores: `scores` names their column in every source, a list of 1 + k numbers."""

    takes_hard_negatives: ClassVar[bool] = True
    needs_negatives: ClassVar[bool] = True
    needs_column: ClassVar[str | None] = "scores"

    name: str = "score_distillation"
    temperature: float = 0.02
    teacher_temperature: float = 1.0
    matryoshka: Matryoshka | None = None
    quantised: Quantised | None = None

    def check(self) -> None:
        for key in ("temperature", "teacher_temperature"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"loss.{key} must be above 0, got {getattr(self, key)}; 0.02 for cosines and 1 for logits are usual")
        check_copies(self)

    def check_width(self, width: int, model: str) -> None:
        check_copies_width(self, width, model)

    def function(self) -> Callable:
        return with_copies(score_distillation, self.matryoshka, self.quantised)

    def options(self, batch: LossBatch) -> dict[str, Any]:
        scores = batch.scores
        if scores is None:  # a batch without a row of a scored source, or a plan's
            scores = torch.full((len(batch.query_ids), 1), math.nan, device=batch.query_ids.device)
        if batch.rows is not None:
            scores = torch.where(batch.rows[:, None], scores, math.nan)
        options = {"scores": scores, "temperature": self.temperature, "teacher_temperature": self.teacher_temperature}
        if batch.hard_offsets is not None:
            options["hard_offsets"] = batch.hard_offsets
        return options if batch.group is None else {**options, "group": batch.group}

    def figures(self, function: Callable) -> dict[str, float]:
        return {"temperature": self.temperature}

    def words(self) -> str:
        return f"by distillation from a teacher's scores at temperature {self.temperature:g}"
