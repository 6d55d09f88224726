"""The whole loss of a recipe: one section alone, or a sum of sections, of which each source of the mixture may have its own.

A row counts in the sections of its source, or in the recipe's where its source names none; for the others' rows its target stays a
candidate, as in one loss over the batch. Each section is a mean over its rows; the sum weighs it by its `weight` and by its rows'
share in the batch, so that a source which names the recipe's own section changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .base import Loss, LossBatch, accuracy


@dataclass(frozen=True)
class Part:
    """One section of a sum.

    Attributes:
        label: under which it is logged. loss: the section. sources: whose rows it counts; None: every source's.
    """

    label: str
    loss: Loss
    sources: tuple[int, ...] | None


@dataclass
class PartFigures:
    """What a step of a sum tells: `losses` {label: (0-d loss of the section, 0-d share of its rows)}, `stats` with their shares."""

    losses: dict[str, tuple[torch.Tensor, torch.Tensor]]
    stats: list[tuple[Any, torch.Tensor]]


def whole_loss(sections: Loss | list[Loss], names: Sequence[str], own: Sequence[Loss | list[Loss] | None], *, strict: bool = False) -> Loss:
    """The loss of a recipe's `loss:` and of its sources' (`own`, one entry for each of `names`); `strict`: its `data.strict`."""
    general = sections if isinstance(sections, list) else [sections]
    chosen = [general if one is None else one if isinstance(one, list) else [one] for one in own]
    used = [loss for source in chosen for loss in source] or general
    distinct = [loss for at, loss in enumerate(used) if loss not in used[:at]]
    for loss in [*general, *used]:
        loss.source_names, loss.strict = tuple(names), strict
    if len(distinct) == 1 and distinct[0].weight == 1 and all(len(source) == 1 for source in chosen):
        return distinct[0]
    parts = []
    for loss in distinct:
        sources = tuple(at for at, source in enumerate(chosen) if loss in source)
        label = loss.name
        if any(label == part.label for part in parts):
            label = f"{loss.name}_{len(parts)}" if len(sources) == len(chosen) else f"{loss.name}_{names[sources[0]]}"
        if any(label == part.label for part in parts):
            label = f"{label}_{len(parts)}"
        parts.append(Part(label, loss, None if len(sources) == len(chosen) else sources))
    return Several(parts)


class Several(Loss):
    """A sum of sections; it answers as a section does."""

    name = "several"
    weight = 1.0

    def __init__(self, parts: list[Part]):
        self.parts = parts

    @property
    def takes_hard_negatives(self) -> bool:
        return any(part.loss.takes_hard_negatives for part in self.parts)

    @property
    def needs_negatives(self) -> bool:
        return any(part.loss.needs_negatives for part in self.parts)

    @property
    def learns(self) -> bool:
        return any(part.loss.learns for part in self.parts)

    def check_width(self, width: int, model: str) -> None:
        for part in self.parts:
            part.loss.check_width(width, model)

    def check_rows(self, places: Sequence[tuple[int, int]]) -> None:
        for part in self.parts:
            part.loss.check_rows([place for place in places if part.sources is None or place[0] in part.sources])

    def function(self) -> Callable:
        return SumOfLosses(
            [part.label for part in self.parts],
            [part.loss.function() for part in self.parts],
            [part.loss.weight for part in self.parts],
            [part.loss.takes_hard_negatives for part in self.parts],
        )

    def options(self, batch: LossBatch) -> dict[str, Any]:
        rows = [self._rows(part, batch) for part in self.parts]
        changed = [
            batch if of_part is None else replace(batch, rows=of_part, counted=self._counted(part, batch))
            for part, of_part in zip(self.parts, rows, strict=True)
        ]
        return {
            "parts": [part.loss.options(one) for part, one in zip(self.parts, changed, strict=True)],
            "rows": rows,
            "group": batch.group,
        }

    @staticmethod
    def _rows(part: Part, batch: LossBatch) -> torch.Tensor | None:
        if part.sources is None:
            return None
        counted = torch.zeros_like(batch.sources, dtype=torch.bool)
        for source in part.sources:
            counted |= batch.sources == source
        return counted

    @staticmethod
    def _counted(part: Part, batch: LossBatch) -> np.ndarray:
        """`_rows` that can be read, on the host."""
        own = np.isin([source for source, _ in batch.places], part.sources)
        return own if batch.counted is None else own & batch.counted

    def figures(self, function: Callable) -> dict[str, float]:
        return {
            f"{name}_{part.label}": value
            for part, module in zip(self.parts, function.functions, strict=True)
            for name, value in part.loss.figures(module).items()
        }

    def words(self) -> str:
        return "by a sum of losses: " + ", ".join(
            f"{part.label}" + (f" (weight {part.loss.weight:g})" if part.loss.weight != 1 else "") for part in self.parts
        )

    def held_out(self, function, query, target, batch, readable, hard_negatives=None) -> tuple[float, float]:
        """The sections of the rows' own source, weighed and added up; the rows are of one source."""
        source, total = int(batch.sources[0]), 0.0
        for part, module in zip(self.parts, function.functions, strict=True):
            if part.sources is None or source in part.sources:
                more = hard_negatives if part.loss.needs_negatives else None
                total += part.loss.weight * part.loss.held_out(module, query, target, batch, readable, more)[0]
        return total, accuracy(query, target, batch, {"query_mask": readable, "target_mask": readable})


class SumOfLosses(torch.nn.Module):
    """The function of `Several`. Modules among the sections' functions are its children, by their labels.

    Args:
        functions, weights, takes_hard: of the sections, one entry each.
    """

    def __init__(self, labels: list[str], functions: list[Callable], weights: list[float], takes_hard: list[bool]):
        super().__init__()
        self.labels, self.weights, self.takes_hard = labels, weights, takes_hard
        self._plain = [None if isinstance(function, torch.nn.Module) else function for function in functions]
        for label, function in zip(labels, functions, strict=True):
            if isinstance(function, torch.nn.Module):
                self.add_module(label.replace(".", "_"), function)

    @property
    def functions(self) -> list[Callable]:
        """Of the sections, in their order."""
        return [self._modules[label.replace(".", "_")] if plain is None else plain for label, plain in zip(self.labels, self._plain)]

    def forward(
        self,
        query: torch.Tensor,
        target: torch.Tensor,
        *,
        parts: list[dict[str, Any]],
        rows: list[torch.Tensor | None],
        group: dist.ProcessGroup | None = None,
        query_mask: torch.Tensor | None = None,
        target_mask: torch.Tensor | None = None,
        hard_negatives: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, PartFigures]:
        """(sum, figures). Options of the sections are `parts`, `rows` (N,) bool or None say whose rows count in each."""
        masks = {} if query_mask is None else {"query_mask": query_mask, "target_mask": target_mask}
        shares = self._shares(query, rows, query_mask, group)
        total, figures = None, PartFigures({}, [])
        for at, function in enumerate(self.functions):
            hard = {"hard_negatives": hard_negatives} if hard_negatives is not None and self.takes_hard[at] else {}
            value = function(query, target, **masks, **hard, **parts[at])
            value, stats = value if isinstance(value, tuple) else (value, None)
            share = shares[at].to(value.dtype)
            weighed = self.weights[at] * share * value
            total = weighed if total is None else total + weighed
            figures.losses[self.labels[at]] = (value.detach(), share)
            if stats is not None:
                figures.stats.append((stats, share))
        return total, figures

    @staticmethod
    def _shares(query: torch.Tensor, rows: list[torch.Tensor | None], mask: torch.Tensor | None, group) -> list[torch.Tensor]:
        """Of the batch's rows that count, the share of each section's; over all ranks."""
        if all(counted is None for counted in rows):
            return [torch.ones((), device=query.device)] * len(rows)
        kept = torch.ones(len(query), dtype=torch.bool, device=query.device) if mask is None else mask
        counts = torch.stack([kept.sum(), *((kept if counted is None else kept & counted).sum() for counted in rows)]).double()
        if group is not None:
            dist.all_reduce(counts, group=group)
        return list(counts[1:] / counts[0].clamp(min=1))
