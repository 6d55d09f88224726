"""InfoNCE, the default: its options are those of `contrastive_kernels.info_nce` that a recipe can say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from contrastive_kernels import InfoNCELoss, InfoNCEOptions, info_nce

from .base import Loss, LossBatch
from .copies import Matryoshka, Quantised, check_copies, check_copies_width, inner, with_copies
from .temperature import PAIRS, RowTemperatures, Temperature

# Options that are no recipe's: of the batch, or what a step always does.
_OF_A_STEP = {"normalize", "group", "reduction", "return_stats", "validate", "ignore_index"}


def recipe_options() -> list[tuple[str, Any, Any]]:
    """(name, type, default) of the options that a recipe can say: all of `InfoNCEOptions` but tensors of a batch.

    The one place where the section follows from the loss's own table.
    """
    types = {"float | torch.Tensor": float | Temperature, "float": float, "bool": bool, "str": str, "float | None": float | None}
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
        if self.matryoshka is not None and self.matryoshka_dims is not None:
            raise ValueError("loss.matryoshka and loss.matryoshka_dims say the same; expected one of them, got both: keep the section")
        check_copies(self)
        if isinstance(self.temperature, Temperature):
            self.temperature.check()
            if self.learnable_temperature:
                raise ValueError("loss.learnable_temperature: true is loss.temperature.learn: global; expected one of them, leave it out")
            if self.learn in ("source", "modality") and self.hardness:
                raise ValueError(
                    f"loss.hardness: expected 0 beside temperature.learn: {self.learn}, which gives rows temperatures of their own, got "
                    f"{self.hardness:g}; leave one out, or learn: global"
                )
        try:
            InfoNCEOptions.make(self._said(), held=True)
            if self.learn == "global":
                self.function()
        except ValueError as error:
            raise ValueError(f"loss.{error}") from None

    def check_width(self, width: int, model: str) -> None:
        check_copies_width(self, width, model)
        if self.matryoshka_dims and max(self.matryoshka_dims) > width:
            most = max(self.matryoshka_dims)
            raise ValueError(f"loss.matryoshka_dims: {most} is above the {width} dimensions of {model}; leave it out")

    @property
    def start(self) -> float:
        """The temperature, or where it starts."""
        return self.temperature.start if isinstance(self.temperature, Temperature) else self.temperature

    @property
    def learn(self) -> str:
        """Which temperatures are learned: none, global, source or modality."""
        if isinstance(self.temperature, Temperature):
            return self.temperature.learn
        return "global" if self.learnable_temperature else "none"

    @property
    def tells_sources(self) -> bool:
        return self.learn == "source"

    @property
    def learns(self) -> bool:
        return self.learn != "none"

    def function(self) -> Callable:
        function = info_nce
        if self.learn == "global":
            function = InfoNCELoss(temperature=self.start, learnable_temperature=True)
        elif self.learns:
            function = RowTemperatures(self.source_names if self.learn == "source" else PAIRS, self.start)
        return with_copies(function, None, self.quantised)  # prefixes are the loss's own

    def options(self, batch: LossBatch) -> dict[str, Any]:
        options = {**self._said(), "normalize": True, "return_stats": True}
        if self.learns:
            del options["temperature"]  # the module's own
        if self.learn in ("source", "modality"):
            options["temperature_of"] = batch.sources if self.learn == "source" else batch.pairs
        if batch.group is not None:
            options["group"] = batch.group
        else:
            options.pop("exchange", None)
        if batch.rows is not None:
            places = torch.arange(len(batch.rows), device=batch.rows.device)
            options["positives"] = torch.where(batch.rows, places, InfoNCEOptions.ignore_index)
        if self.own_negatives_only:
            options["own_negatives_only"] = torch.ones_like(batch.query_ids, dtype=torch.bool)
        if batch.hard_offsets is not None:
            options["hard_offsets"] = batch.hard_offsets
        if self.mask_duplicates:
            options |= {"target_ids": batch.target_ids, "query_ids": batch.query_ids, "target_query_ids": batch.query_ids}
            if batch.hard_ids is not None:
                options["hard_ids"] = batch.hard_ids
        return options

    def figures(self, function: Callable) -> dict[str, float]:
        function = inner(function)
        if isinstance(function, RowTemperatures):
            return function.figures()
        return {"temperature": float(function.temperature.detach()) if self.learns else self.start}

    def words(self) -> str:
        which = {"none": "", "global": ", learned from there"}.get(self.learn, f", learned from there for each {self.learn}")
        return f"at temperature {self.start:g}{which}"

    def held_out(self, function, query, target, batch, readable, hard_negatives=None) -> tuple[float, float]:
        masks = {"query_mask": readable, "target_mask": readable}
        ids = {"target_ids": batch.target_ids} if self.mask_duplicates else {}
        function = inner(function)
        if isinstance(function, RowTemperatures):
            of = batch.sources if self.learn == "source" else batch.pairs
            temperature = function.temperatures()[of].to(query.dtype)
        else:
            temperature = self.figures(function)["temperature"]
        loss, stats = info_nce(query, target, temperature=temperature, normalize=True, return_stats=True, **masks, **ids)
        return float(loss), float(stats.accuracy)

    def _said(self) -> dict[str, Any]:
        """Options that differ from their defaults, and the temperature."""
        said = {name: getattr(self, name) for name, _, default in recipe_options() if getattr(self, name) != default}
        if self.matryoshka is not None:
            said["matryoshka_dims"] = self.matryoshka.dims
            if self.matryoshka.weights is not None:
                said["matryoshka_weights"] = self.matryoshka.weights
        return {**said, "temperature": self.start}


InfoNCE = dataclasses.make_dataclass(
    "InfoNCE",
    [
        ("name", str, "info_nce"),
        *recipe_options(),
        ("learnable_temperature", bool, False),
        ("own_negatives_only", bool, False),
        ("matryoshka", Matryoshka | None, None),
        ("quantised", Quantised | None, None),
    ],
    bases=(dataclasses.dataclass(_InfoNCE),),
    namespace={
        "__doc__": """Options of `contrastive_kernels.info_nce`; see there.

    temperature: a number, or {start:, learn:} (`train.losses.temperature`); `learnable_temperature: true` is learn: global.
    own_negatives_only: rows of this section see only their own hard negatives, as labels of a classification.
    matryoshka, quantised: sections of `train.losses.copies`."""
    },
)
InfoNCE.__module__ = __name__  # make_dataclass names its own
