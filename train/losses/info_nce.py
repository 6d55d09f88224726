"""InfoNCE, the default: its options are those of `contrastive_kernels.info_nce` that a recipe can say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from contrastive_kernels import InfoNCELoss, InfoNCEOptions, info_nce

from .base import Loss, LossBatch

# Options that are no recipe's: of the batch, or what a step always does.
_OF_A_STEP = {"normalize", "group", "reduction", "return_stats", "validate", "ignore_index"}


def recipe_options() -> list[tuple[str, Any, Any]]:
    """(name, type, default) of the options that a recipe can say: all of `InfoNCEOptions` but tensors of a batch.

    The one place where the section follows from the loss's own table.
    """
    types = {"float | torch.Tensor": float, "float": float, "bool": bool, "str": str, "float | None": float | None}
    types |= {"tuple[int, ...] | None": list[int] | None, "tuple[float, ...] | None": list[float] | None}
    fields = [f for f in dataclasses.fields(InfoNCEOptions) if f.name not in _OF_A_STEP and f.metadata["schema"] != "Tensor?"]
    return [(f.name, types[str(f.type)], f.default) for f in fields]


class _InfoNCE(Loss):
    takes_hard_negatives = True

    def check(self) -> None:
        if self.hardness < 0:  # the loss itself takes one, which makes hard negatives count less: nobody trains so on purpose
            raise ValueError(f"loss.hardness must be 0 or more, got {self.hardness}; 0 turns it off")
        if self.matryoshka_dims is not None and (not self.matryoshka_dims or min(self.matryoshka_dims) < 1):
            raise ValueError(f"loss.matryoshka_dims must list widths of at least 1, got {self.matryoshka_dims}; leave it out")
        try:
            InfoNCEOptions.make(self._said(), held=True)
            if self.learnable_temperature:
                self.function()
        except ValueError as error:
            raise ValueError(f"loss.{error}") from None

    def check_width(self, width: int, model: str) -> None:
        if self.matryoshka_dims and max(self.matryoshka_dims) > width:
            most = max(self.matryoshka_dims)
            raise ValueError(f"loss.matryoshka_dims: {most} is above the {width} dimensions of {model}; leave it out")

    @property
    def learns(self) -> bool:
        return self.learnable_temperature

    def function(self) -> Callable:
        if not self.learnable_temperature:
            return info_nce
        return InfoNCELoss(temperature=self.temperature, learnable_temperature=True)

    def options(self, batch: LossBatch) -> dict[str, Any]:
        options = {**self._said(), "normalize": True, "return_stats": True}
        if self.learnable_temperature:
            del options["temperature"]  # the module's own
        if batch.group is not None:
            options["group"] = batch.group
        else:
            options.pop("exchange", None)
        if batch.hard_offsets is not None:
            options["hard_offsets"] = batch.hard_offsets
        if self.mask_duplicates:
            options |= {"target_ids": batch.target_ids, "query_ids": batch.query_ids, "target_query_ids": batch.query_ids}
            if batch.hard_ids is not None:
                options["hard_ids"] = batch.hard_ids
        return options

    def figures(self, function: Callable) -> dict[str, float]:
        return {"temperature": float(function.temperature) if self.learnable_temperature else self.temperature}

    def words(self) -> str:
        return f"at temperature {self.temperature:g}" + (", learned from there" if self.learnable_temperature else "")

    def held_out(
        self, function: Callable, query: torch.Tensor, target: torch.Tensor, target_ids: torch.Tensor, readable: torch.Tensor
    ) -> tuple[float, float]:
        ids = {"target_ids": target_ids} if self.mask_duplicates else {}
        temperature = self.figures(function)["temperature"]
        masks = {"query_mask": readable, "target_mask": readable}
        loss, stats = info_nce(query, target, temperature=temperature, normalize=True, return_stats=True, **masks, **ids)
        return float(loss), float(stats.accuracy)

    def _said(self) -> dict[str, Any]:
        """Options that differ from their defaults, and the temperature."""
        said = {name: getattr(self, name) for name, _, default in recipe_options() if getattr(self, name) != default}
        return {**said, "temperature": self.temperature}


InfoNCE = dataclasses.make_dataclass(
    "InfoNCE",
    [("name", str, "info_nce"), *recipe_options(), ("learnable_temperature", bool, False)],
    bases=(dataclasses.dataclass(_InfoNCE),),
    namespace={"__doc__": "Options of `contrastive_kernels.info_nce`; see there. A learnable temperature starts at `temperature`."},
)
InfoNCE.__module__ = __name__  # make_dataclass names its own
