"""Recipes: what a training run is, as a YAML file plus `--key value` overrides, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm2vec.files.documents import read_yaml

from ..losses import Loss
from ..losses.several import whole_loss
from .checks import check
from .files import recipe_path
from .from_yaml import assign, build
from .keys import Content as Content
from .keys import Data as Data
from .keys import RecipeKeys
from .keys import Source as Source
from .keys import read_mixture as read_mixture
from .reference_flags import parse_overrides


@dataclass
class Recipe(RecipeKeys):
    """A whole run, checked: what cannot run on any machine raises ValueError here."""

    def __post_init__(self) -> None:
        if self.interleave_batch_size is None:
            self.interleave_batch_size = self.global_batch
        if self.report_to == ["none"]:  # the reference's word for nowhere
            self.report_to = []
        self.check()

    @functools.cached_property
    def objective(self) -> Loss:
        """The whole loss: the recipe's sections and its sources' own."""
        sources, strict = self.data.sources, self.data.strict
        return whole_loss(self.loss, [source.name for source in sources], [source.loss for source in sources], strict=strict)

    @property
    def whole_words(self) -> str:
        """What of the model trains itself, for people; "" where an adapter alone does."""
        if self.train is not None and "all" not in self.train:
            return f"the weights of {' and '.join(self.train)}"
        if self.lora is not None:
            return ""
        return "all weights but the vision tower's" if self.freeze_vision else "all weights"

    @property
    def held_out_rows(self) -> int:
        """Most rows of each source that are kept out of training."""
        return self.held_out.rows if self.held_out else 0

    def check(self) -> None:
        """Raises ValueError for what cannot run, before a model is loaded (`train.recipe.checks`)."""
        check(self)

    def check_ranks(self, ranks: int) -> None:
        """Raises ValueError for a global batch that does not make equal shares."""
        if self.global_batch % ranks:
            near = max(ranks, round(self.global_batch / ranks) * ranks)
            raise ValueError(f"global_batch ({self.global_batch}) must be divisible by the number of ranks ({ranks}); {near} is")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: list[str] = (), *, ranks: int | None = None) -> Recipe:
    """Reads a recipe, a file or one of the project's by its name, and applies `--key value` pairs.

    Nested keys are written with dots: `--loss.temperature 0.05`.

    Args:
        ranks: processes that the run will have, where flags count by the process; default those of this launch.

    Raises:
        ValueError: for a file that is not a recipe, an unknown key (with the nearest known one), a value of the wrong
            type, or a recipe that contradicts itself.
    """
    path = recipe_path(path)
    values = read_yaml(path, "recipe")
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} must be a mapping of keys to values, got {type(values).__name__}")
    for key, value in parse_overrides(overrides, ranks=ranks, has_lora=values.get("lora") is not None):
        assign(values, key, value)
    return build(Recipe, values, where="")
