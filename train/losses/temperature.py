"""Temperatures that are learned: one, one for each source of the mixture, or one for each kind of pair (text to image, ...)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from contrastive_kernels import info_nce
from contrastive_kernels.info_nce import LearnedNumbers
from contrastive_kernels.options import TEMPERATURE_RANGE

from .base import KINDS

LEARN = ("none", "global", "source", "modality")
PAIRS = tuple(f"{query}_{target}" for query in KINDS for target in KINDS)  # by 3 * kind of the query + kind of the target


@dataclass
class Temperature:
    """The section `temperature:` of a loss.

    Attributes:
        start: where it starts, or stays. learn: "none", "global" (one), "source" (one a source), "modality" (one a kind of pair).
    """

    start: float = 0.02
    learn: str = "none"

    def check(self) -> None:
        if self.learn not in LEARN:
            raise ValueError(f"loss.temperature.learn: expected one of {', '.join(LEARN)}, got {self.learn!r}; none holds it constant")
        least, most = TEMPERATURE_RANGE
        if self.learn != "none" and not least <= self.start <= most:
            raise ValueError(
                f"loss.temperature.start: expected a start within [{least}, {most:g}] for a learned one, got {self.start:g}; start at 0.02"
            )


class RowTemperatures(LearnedNumbers):
    """`info_nce` whose rows divide by temperatures of their own: one for each of `names`, learned as its logarithm.

    Args:
        names: of the temperatures. start: where each starts.

    A temperature stays in [0.001, 10]; beyond a bound only a gradient that leads back reaches it.
    """

    def __init__(self, names: tuple[str, ...], start: float):
        super().__init__()
        self.names = names
        logarithm = self.number(math.log(start)).detach()
        self.start = float(logarithm.exp())
        self.log_temperature = torch.nn.Parameter(logarithm.repeat(len(names)))

    def temperatures(self) -> torch.Tensor:
        """(len(names),) in use, with their gradient."""
        least, most = map(math.log, TEMPERATURE_RANGE)
        return _Bounded.apply(self.log_temperature, least, most).exp()

    def forward(self, query: torch.Tensor, target: torch.Tensor, *, temperature_of: torch.Tensor, **options: Any):
        """Loss of one batch; `temperature_of` (N,) int64 says which temperature is a row's."""
        return info_nce(query, target, temperature=self.temperatures()[temperature_of], **options)

    def figures(self) -> dict[str, float]:
        """Temperatures that have left their start, by name."""
        values = zip(self.names, self.temperatures().detach().tolist(), strict=True)
        return {f"temperature_{name}": value for name, value in values if not math.isclose(value, self.start, rel_tol=1e-7)}


class _Bounded(torch.autograd.Function):
    """clamp(x, least, most) that passes the gradient which leads back from a bound, as torch's own does not."""

    @staticmethod
    def forward(ctx, x, least: float, most: float):
        ctx.save_for_backward(x)
        ctx.bounds = least, most
        return x.clamp(least, most)

    @staticmethod
    def backward(ctx, grad):
        (x,), (least, most) = ctx.saved_tensors, ctx.bounds
        outward = ((x <= least) & (grad > 0)) | ((x >= most) & (grad < 0))
        return torch.where(outward, 0, grad), None, None
