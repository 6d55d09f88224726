"""Matryoshka: the sum over widths of weight * loss of the re-normalised prefix."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..options import InfoNCEOptions
from .gradients import Computed


def level_options(options: InfoNCEOptions) -> list[tuple[int, InfoNCEOptions]]:
    """(width, options of that level alone), in the order of `options.matryoshka_dims`; statistics are the widest level's."""
    levels = []
    for dim in options.matryoshka_dims:
        hard = None if options.hard_negatives is None else options.hard_negatives[..., :dim]
        level = options.replace(
            matryoshka_dims=None,
            matryoshka_weights=None,
            normalize=True,
            hard_negatives=hard,
            return_stats=options.return_stats and dim == max(options.matryoshka_dims),
        )
        levels.append((dim, level))
    return levels


def level_weights(options: InfoNCEOptions) -> tuple[float, ...]:
    return options.matryoshka_weights or (1.0,) * len(options.matryoshka_dims)


def weighted_sum(query: torch.Tensor, target: torch.Tensor, options: InfoNCEOptions, levels: Iterable[Computed]) -> Computed:
    """All levels' values and gradients, the latter over the whole width."""
    total = Computed(0.0)
    for dim, weight, level in zip(options.matryoshka_dims, level_weights(options), levels):
        total.loss = total.loss + weight * level.loss
        if level.stat_sums is not None:
            total.stat_sums = level.stat_sums
        for name, like in (("d_query", query), ("d_target", target), ("d_hard_negatives", options.hard_negatives)):
            gradient = getattr(level, name)
            if gradient is None:
                continue
            if getattr(total, name) is None:
                setattr(total, name, torch.zeros(like.shape, dtype=gradient.dtype, device=gradient.device))
            getattr(total, name)[..., :dim].add_(gradient, alpha=weight)
        if level.d_temperature is not None:
            before = 0.0 if total.d_temperature is None else total.d_temperature
            total.d_temperature = before + weight * level.d_temperature
    return total
