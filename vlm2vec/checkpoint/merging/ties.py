"""TIES: changes of several models to one base, trimmed, brought to one sign each, and averaged among those that have it.

For model t with changes d_t, weight w_t and scale s:

    trim       d_t keeps its `density` largest numbers by magnitude, over all of its tensors together; the others become 0
    elect      sign of sum_t w_t d_t, number by number
    merge      sum of w_t d_t over the models that bear the sign, over the sum of their w_t; 0 where none does

Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (NeurIPS 2023), Algorithm 1; equal weights are the
paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

_LOW = 15  # of the 31 bits of a float32 without its sign, those counted in the second reading


def threshold(read: Callable[[], Iterable[torch.Tensor]], density: float) -> float:
    """The least magnitude that is kept: the k-th largest of all numbers, k = `density` of their count, at least 1.

    Magnitudes of float32 are in the order of their bits as integers, so two readings that count bits find it exactly, whatever the
    size: the first counts the upper bits, the second the lower ones of numbers with the upper bits of the k-th.

    Args:
        read: gives the tensors, float32, anew each time.

    Example:
        >>> round(threshold(lambda: [torch.tensor([0.5, -3.0]), torch.tensor([1.0, 0.1])], 0.5), 4)
        1.0
    """
    upper, total = torch.zeros(2 ** (31 - _LOW), dtype=torch.int64), 0
    for tensor in read():
        total += tensor.numel()
        upper += torch.bincount(_bits(tensor) >> _LOW, minlength=len(upper))
    rank = max(1, int(density * total))
    high, above = _place(upper, rank)
    lower = torch.zeros(2**_LOW, dtype=torch.int64)
    for tensor in read():
        bits = _bits(tensor)
        lower += torch.bincount(bits[bits >> _LOW == high] & (2**_LOW - 1), minlength=len(lower))
    low, _ = _place(lower, rank - above)
    return torch.tensor((high << _LOW) | low, dtype=torch.int32).view(torch.float32).item()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().abs().reshape(-1).view(torch.int32)


def _place(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """(bin of the `rank`-th largest, how many lie in bins above it)."""
    from_top = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(from_top, torch.tensor(rank)))
    return len(counts) - 1 - at, int(from_top[at] - counts.flip(0)[at])


def merged(changes: Sequence[torch.Tensor], weights: Sequence[float], least: Sequence[float]) -> torch.Tensor:
    """One tensor's merged changes.

    Args:
        changes: of each model. weights: above 0. least: each model's `threshold`.

    Example:
        >>> merged([torch.tensor([2.0, 1.0, 0.1]), torch.tensor([-1.0, 3.0, 0.2])], [1, 1], [0.5, 0.5])
        tensor([2., 2., 0.])
    """
    trimmed = [torch.where(change.abs() >= bound, change, 0) for change, bound in zip(changes, least, strict=True)]
    elected = sum(weight * change for weight, change in zip(weights, trimmed, strict=True)).sign()
    total, mass = torch.zeros_like(trimmed[0]), torch.zeros_like(trimmed[0])
    for weight, change in zip(weights, trimmed, strict=True):
        agrees = (change.sign() == elected) & (change != 0)
        total += torch.where(agrees, weight * change, 0)
        mass += torch.where(agrees, weight, 0.0)
    return total / torch.where(mass > 0, mass, 1)
