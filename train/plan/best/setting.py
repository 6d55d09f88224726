"""A choice of what a step spends its memory on. None of it changes what is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...recipe.schema import Recipe


@dataclass(frozen=True)
class Way:
    """What of a choice has to be simulated: how a chunk is run. The rest says which chunks there are.

    Attributes:
        checkpoints: `gradient_checkpointing` of the recipe. distributed: "ddp" or "fsdp".
        keep_mib: bound on features of a frozen vision tower.
    """

    checkpoints: bool
    distributed: str
    keep_mib: float

    def of(self, recipe: Recipe) -> Recipe:
        return replace(recipe, gradient_checkpointing=self.checkpoints, distributed=self.distributed, keep_mib=self.keep_mib)


@dataclass(frozen=True)
class Setting:
    """A way with its chunks.

    Attributes:
        chunk_tokens: budget of a chunk. retain: chunks that keep their graph; a number bounds what a larger batch takes, "all" does not.
    """

    way: Way
    chunk_tokens: int
    retain: int

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with this choice in place of its own."""
        return replace(self.way.of(recipe), chunk_tokens=self.chunk_tokens, chunk_rows=None, retain=self.retain, retain_mib=None)

    def changes(self, recipe: Recipe) -> dict[str, object]:
        """Keys of the recipe that it changes, with their new values; None stands for a key that goes."""
        new = self.of(recipe)
        names = ("chunk_tokens", "chunk_rows", "retain", "retain_mib", "gradient_checkpointing", "keep_mib", "distributed")
        return {name: getattr(new, name) for name in names if getattr(new, name) != getattr(recipe, name)}


def ways(recipe: Recipe, ranks: int, keep_mib: float) -> list[Way]:
    """The ways to run a chunk that the recipe allows; those that compute nothing twice first."""
    kinds = [recipe.distributed]
    if ranks > 1 and not recipe.quantization and not any(part in recipe.optimizer for part in ("8bit", "4bit", "paged")):
        kinds = ["ddp", "fsdp"] if recipe.autocast != "float16" else kinds
    return [Way(checkpoints, kind, keep_mib) for checkpoints in (False, True) for kind in kinds]
