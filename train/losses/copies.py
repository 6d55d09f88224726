"""Losses over changed copies of the embeddings: prefixes of them (Matryoshka), and what an index of few bits makes of them.

Kusupati et al., "Matryoshka Representation Learning" (2022); the straight-through gradient is that of Bengio et al. (2013): the
copy's gradient is taken for the embedding's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

QUANTISED = ("int8", "binary")
_OPERANDS = ("hard_negatives",)  # of a loss's options, those that are embeddings


@dataclass
class Matryoshka:
    """The section `matryoshka:` of a loss: the sum over `dims` only of weight (default 1) times the loss of the prefix.

    List the whole width too where whole embeddings are to be trained.
    """

    dims: list[int]
    weights: list[float] | None = None

    def check(self) -> None:
        if not self.dims or min(self.dims) < 1:
            raise ValueError(f"loss.matryoshka.dims must list widths of at least 1, got {self.dims}; leave the section out")
        if self.weights is not None and len(self.weights) != len(self.dims):
            raise ValueError(
                f"loss.matryoshka.weights: expected {len(self.dims)} numbers, one a width, got {len(self.weights)}; leave them out for 1"
            )


@dataclass
class Quantised:
    """The section `quantised:` of a loss: what it adds is `weight` times the mean of the loss over copies of these `kinds`."""

    kinds: list[str]
    weight: float = 1.0

    def check(self) -> None:
        wrong = [kind for kind in self.kinds if kind not in QUANTISED]
        if wrong or not self.kinds:
            raise ValueError(f"loss.quantised.kinds: expected some of {', '.join(QUANTISED)}, got {self.kinds}; leave the section out")


def quantised(embeddings: torch.Tensor, kind: str) -> torch.Tensor:
    """(N, D) as an index of int8 numbers, or of signs alone, holds them, at about length 1; the gradient is taken for that of the
    normalised embeddings.

    int8: whole steps, 127 of them to a row's largest number. binary: 1 / sqrt(D) for numbers above 0, -1 / sqrt(D) for others.

    Example:
        >>> quantised(torch.tensor([[3.0, -4.0, 0.0, 0.0]]), "binary")
        tensor([[ 0.5000, -0.5000, -0.5000, -0.5000]])
    """
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    with torch.no_grad():
        if kind == "binary":
            length = unit.shape[-1] ** -0.5
            made = torch.where(unit > 0, length, -length).to(unit.dtype)
        else:
            step = unit.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(unit.dtype).tiny) / 127
            made = (unit / step).round() * step
    return _StraightThrough.apply(unit, made)


class _StraightThrough(torch.autograd.Function):
    """`made`, to the last bit, with the gradient of `unit`."""

    @staticmethod
    def forward(ctx, unit, made):
        return made.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Copies(torch.nn.Module):
    """A loss's function over prefixes and quantised copies of the embeddings.

    Args:
        function: `function(query, target, **options) -> loss`, or a pair of it and statistics, which are the whole width's.
        matryoshka: None where the function looks at prefixes itself, or nobody does.
    """

    def __init__(self, function: Callable, matryoshka: Matryoshka | None, quantised: Quantised | None):
        super().__init__()
        self.matryoshka, self.quantised = matryoshka, quantised
        if isinstance(function, torch.nn.Module):
            self.inner = function  # its child
        else:
            self.__dict__["inner"] = function

    def forward(self, query: torch.Tensor, target: torch.Tensor, **options: Any):
        loss, stats = self._widths(query, target, options)
        if self.quantised is not None:
            for kind in self.quantised.kinds:
                changed = {name: quantised(options[name], kind) for name in _OPERANDS if options.get(name) is not None}
                copy, _ = self._widths(quantised(query, kind), quantised(target, kind), {**options, **changed})
                loss = loss + self.quantised.weight / len(self.quantised.kinds) * copy
        return loss if stats is None else (loss, stats)

    def _widths(self, query, target, options) -> tuple[torch.Tensor, Any]:
        if self.matryoshka is None:
            return _pair(self.inner(query, target, **options))
        total, widest, stats = 0.0, 0, None
        for dim, weight in zip(self.matryoshka.dims, self.matryoshka.weights or [1.0] * len(self.matryoshka.dims), strict=True):
            cut = {name: options[name][..., :dim] for name in _OPERANDS if options.get(name) is not None}
            loss, told = _pair(self.inner(query[..., :dim], target[..., :dim], **{**options, **cut}))
            total = total + weight * loss
            if dim > widest:
                widest, stats = dim, told
        return total, stats


def _pair(value: Any) -> tuple[torch.Tensor, Any]:
    return value if isinstance(value, tuple) else (value, None)


def with_copies(function: Callable, matryoshka: Matryoshka | None, quantised: Quantised | None) -> Callable:
    """The function itself, or over copies where a section asks for them."""
    return function if matryoshka is None and quantised is None else Copies(function, matryoshka, quantised)


def inner(function: Callable) -> Callable:
    """The function that `with_copies` was handed."""
    return function.inner if isinstance(function, Copies) else function


def check_copies(loss: Any) -> None:
    """Checks the sections `matryoshka` and `quantised` of a loss."""
    for section in (loss.matryoshka, loss.quantised):
        if section is not None:
            section.check()


def check_copies_width(loss: Any, width: int, model: str) -> None:
    """Raises ValueError for prefixes that embeddings of `width` dimensions do not have."""
    if loss.matryoshka is not None and max(loss.matryoshka.dims) > width:
        raise ValueError(f"loss.matryoshka.dims: {max(loss.matryoshka.dims)} is above the {width} dimensions of {model}; leave it out")
