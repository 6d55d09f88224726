"""The sigmoid loss of SigLIP: every pair is a yes or no of its own; scale and bias are learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from contrastive_kernels import sigmoid_loss
from contrastive_kernels.info_nce import LearnedNumbers

from .base import Loss, LossBatch
from .copies import Matryoshka, Quantised, check_copies, check_copies_width, inner, with_copies


class ScaledSigmoid(LearnedNumbers):
    """`sigmoid_loss` with its scale, kept as its logarithm, and its bias.

    Args:
        scale, bias: start values, or the constants. learns: whether they are parameters.
    """

    def __init__(self, scale: float, bias: float, learns: bool):
        super().__init__()
        self.log_scale = self.number(math.log(scale), learns)
        self.bias = self.number(bias, learns)

    def forward(self, query: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        return sigmoid_loss(query, target, scale=self.log_scale.exp(), bias=self.bias, **options)


@dataclass
class Sigmoid(Loss):
    """Options of `contrastive_kernels.sigmoid_loss`; see there. `scale` and `bias` are where they start, where they are learned."""

    name: str = "sigmoid_loss"
    scale: float = 10.0
    bias: float = -10.0
    learn: bool = True
    exchange: str = "gather"
    matryoshka: Matryoshka | None = None
    quantised: Quantised | None = None

    def __post_init__(self) -> None:
        self.name = Sigmoid.name  # also where a recipe says "sigmoid"

    def check(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"loss.scale must be above 0, got {self.scale}; it multiplies the similarities (SigLIP starts at 10)")
        if not math.isfinite(self.bias):
            raise ValueError(f"loss.bias must be a finite number, got {self.bias}; SigLIP starts at -10")
        if self.exchange not in ("gather", "ring"):
            raise ValueError(f"loss.exchange must be gather or ring, got {self.exchange!r}; gather is the default")
        check_copies(self)

    def check_width(self, width: int, model: str) -> None:
        check_copies_width(self, width, model)

    @property
    def learns(self) -> bool:
        return self.learn

    def function(self) -> Callable:
        return with_copies(ScaledSigmoid(self.scale, self.bias, self.learn), self.matryoshka, self.quantised)

    def options(self, batch: LossBatch) -> dict[str, Any]:
        options: dict[str, Any] = {"normalize": True}
        if batch.rows is not None:
            places = torch.arange(len(batch.rows), device=batch.rows.device)
            options["positives"] = torch.where(batch.rows, places, -100)
        if self.mask_duplicates:
            options["target_ids"] = batch.target_ids  # a target that bears the positive's id belongs to the query too
        if batch.group is not None:
            options |= {"group": batch.group, "exchange": self.exchange}
        return options

    def figures(self, function: Callable) -> dict[str, float]:
        function = inner(function)
        return {"scale": float(function.log_scale.detach().exp()), "bias": float(function.bias.detach())}

    def words(self) -> str:
        return f"by the sigmoid loss, scale {self.scale:g} and bias {self.bias:g}" + (" at first" if self.learn else "")
