"""CoSENT over graded pairs: of two pairs of one source the better one should have the greater cosine.

    log(1 + sum over pairs i, j with grade_i > grade_j of (grade_i - grade_j) * exp((cos_j - cos_i) / temperature))        in nats

Source: Su, "CoSENT" (2022), as Qwen3-VL-Embedding trains its graded data, which weighs every comparison 1 (`weighted: false`).
Gradients are formed with the value, block by block: no matrix of all comparisons is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from .base import Loss, LossBatch
from .copies import Matryoshka, Quantised, check_copies, check_copies_width, with_copies

_BLOCK = 2**24  # comparisons at one time


def _terms(scaled: torch.Tensor, grades: torch.Tensor, sources: torch.Tensor, weighted: bool) -> Iterator[tuple[slice, torch.Tensor]]:
    """(columns, (N, columns) log of each comparison's term, -inf where i is not better than j) by blocks of columns j."""
    count = len(scaled)
    step = max(1, _BLOCK // max(1, count))
    for first in range(0, count, step):
        columns = slice(first, first + step)
        better = grades[:, None] - grades[None, columns]
        compared = (better > 0) & (sources[:, None] == sources[None, columns])
        logs = scaled[None, columns] - scaled[:, None]
        if weighted:
            logs = logs + torch.where(compared, better, 1.0).log()
        yield columns, torch.where(compared, logs, -math.inf)


class _CoSENT(torch.autograd.Function):
    """The loss of (N,) cosines over temperature; rows with a NaN grade are compared with none."""

    @staticmethod
    def forward(ctx, scaled, grades, sources, weighted: bool):
        total = scaled.new_zeros(())  # log of the 1
        for _, logs in _terms(scaled, grades, sources, weighted):
            total = torch.logaddexp(total, logs.flatten().logsumexp(0))
        gradient = torch.zeros_like(scaled)
        for columns, logs in _terms(scaled, grades, sources, weighted):
            share = (logs - total).exp()
            gradient[columns] += share.sum(0)
            gradient -= share.sum(1)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None, None


def cosent(
    query: torch.Tensor,
    target: torch.Tensor,
    *,
    grades: torch.Tensor,
    sources: torch.Tensor,
    temperature: float,
    weighted: bool = True,
    positives: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
    target_mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """CoSENT of the pairs (query i, target i), 0-d; 0 where there is nothing to compare.

    Args:
        query, target: (N, D), not normalised. grades: (N,) float, NaN leaves a pair out. sources: (N,) int64, pairs of one are compared.
        temperature: divides cosines. positives: (N,) int64, the target of each query; default its own place.
        query_mask, target_mask: (N,) bool; False leaves a pair out.
        group: ranks over which the pairs are spread, equal shards; the gradient is world_size times the global loss's.

    Example:
        >>> query, target = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # cosines 1 and 0, of the better and the worse
        >>> round(cosent(query, target, grades=torch.tensor([1.0, 0.0]), sources=torch.zeros(2), temperature=1.0).item(), 4)
        0.3133
    """
    target = target if positives is None else target[positives]
    dtype = torch.promote_types(query.dtype, torch.float32)
    for mask in (query_mask, target_mask):
        if mask is not None:
            grades = torch.where(mask, grades, math.nan)
    # what does not count may be NaN, whose gradient would be NaN too
    counts = ~grades.isnan()[:, None]
    unit, found = (torch.nn.functional.normalize(torch.where(counts, x, 0).to(dtype), dim=-1) for x in (query, target))
    cosines = (unit * found).sum(-1)
    scaled, grades = cosines / temperature, grades.to(dtype)
    if group is None:
        return _CoSENT.apply(scaled, grades, sources, weighted)
    everyone = [torch.cat(_gathered(x, group)) for x in (scaled.detach(), grades, sources)]
    count, rank, ranks = len(scaled), dist.get_rank(group), dist.get_world_size(group)
    place = torch.arange(rank * count, (rank + 1) * count, device=scaled.device)
    return _CoSENT.apply(everyone[0].index_copy(0, place, _times(scaled, ranks)), *everyone[1:], weighted)


def _gathered(x: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, times: int):
        ctx.times = times
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.times, None


def _times(x: torch.Tensor, times: int) -> torch.Tensor:
    """`x`, whose gradient is multiplied."""
    return _Times.apply(x, times)


@dataclass
class CoSENT(Loss):
    """Graded pairs: `grade` names their column in every source. `weighted`: comparisons weigh the difference of their grades."""

    needs_column: ClassVar[str | None] = "grade"

    name: str = "cosent"
    temperature: float = 0.05
    weighted: bool = True
    matryoshka: Matryoshka | None = None
    quantised: Quantised | None = None

    def check(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"loss.temperature must be above 0, got {self.temperature}; 0.05 is usual")
        check_copies(self)

    def check_width(self, width: int, model: str) -> None:
        check_copies_width(self, width, model)

    def function(self) -> Callable:
        return with_copies(cosent, self.matryoshka, self.quantised)

    def options(self, batch: LossBatch) -> dict[str, Any]:
        grades = batch.grades
        if grades is None:  # a batch without a row of a graded source, or a plan's
            grades = torch.full_like(batch.query_ids, math.nan, dtype=torch.float32)
        if batch.rows is not None:
            grades = torch.where(batch.rows, grades, math.nan)
        options = {"grades": grades, "sources": batch.sources, "temperature": self.temperature, "weighted": self.weighted}
        return options if batch.group is None else {**options, "group": batch.group}

    def figures(self, function: Callable) -> dict[str, float]:
        return {"temperature": self.temperature}

    def words(self) -> str:
        return f"of graded pairs by CoSENT at temperature {self.temperature:g}"
