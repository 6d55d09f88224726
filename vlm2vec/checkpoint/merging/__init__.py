"""Several checkpoints of one base made into one: `vlm2vec merge` and `VLM2Vec.merge`.

| what is merged | linear | ties |
|---|---|---|
| full checkpoints | mean of the weights, tensor by tensor | `ties.py`, of the differences to `base` |
| plain LoRA adapters | an adapter whose rank is the sum of theirs, exactly the mean of their changes | as below |
| DoRA adapters | a full model: the base and the mean of their changes | a full model: the base and the merged changes |

Weights of the models are brought to a sum of 1. Tensors are read, computed in float32 (float64 where they are) and written one by one;
a full model made of adapters takes the memory of its base. Source of "ties": Yadav et al., "TIES-Merging" (NeurIPS 2023). What both
Qwen3-VL-Embedding and WeMM did at their end: models of several stages merged.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm2vec.checkpoint import loading
from vlm2vec.checkpoint.merging.beside import copy_beside
from vlm2vec.files import replacing_folder, write_text

if TYPE_CHECKING:
    from vlm2vec.checkpoint.pretrained import Description

METHODS = ("linear", "ties")
DENSITY = 0.2  # of the paper: a fifth of a task's changes is kept


def merge(
    models: Sequence[str],
    folder: str | os.PathLike,
    load: Callable[..., Any],
    *,
    weights: Sequence[float] | None = None,
    method: str = "linear",
    base: str | None = None,
    density: float = DENSITY,
    scale: float = 1.0,
) -> str:
    """Writes the merged model into `folder`, whole or not at all. Returns a line that says what was made.

    Args:
        models: two or more folders or hub names, all full checkpoints or all adapters of one base.
        load: `VLM2Vec.from_pretrained`.
        weights: one a model, above 0; equal ones by default.
        base: for "ties" of full checkpoints the model that all of them started from; for adapters in place of what they name.
        density: for "ties", the share of a model's changes, the largest, that is kept. scale: what the merged changes are times.

    Raises:
        ValueError: models of several kinds, bases, shapes or names of tensors; a folder that is not empty.
    """
    models, shares = [os.fspath(model) for model in models], _shares(models, weights)
    _check(models, method, density, scale)
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) or folder.is_file():
        raise ValueError(f"{folder}: expected a new or empty folder, got one that holds something; choose another, or remove it")
    from vlm2vec.checkpoint.pretrained import describe

    kinds = [loading.read_json(model, "adapter_config.json") is not None for model in models]
    if len(set(kinds)) > 1:
        adapter, full = models[kinds.index(True)], models[kinds.index(False)]
        raise ValueError(
            f"expected adapters alone or full checkpoints alone, got {adapter}, an adapter, and {full}, which is full; fold the adapter "
            "into its base first (save_pretrained(folder, merge=True))"
        )
    described = [describe(model, base if is_adapter else None) for model, is_adapter in zip(models, kinds)]
    _check_families(models, described)
    with replacing_folder(folder) as part:
        if kinds[0]:
            from vlm2vec.checkpoint.merging.of_adapters import merge_adapters

            what = merge_adapters(models, described, load, part, shares, method, density, scale)
        else:
            from vlm2vec.checkpoint.merging.of_weights import merge_weights

            what = merge_weights(models, described, part, shares, method, base, density, scale)
            copy_beside(models[0], part)
        listed = "\n".join(f"* {share:.4g} of {model}" for share, model in zip(shares, models))
        told = f" (density {density:g}, scale {scale:g})" if method == "ties" else ""
        write_text(part / "README.md", f"# Merged model\n\n{what}, by `vlm2vec merge`, {method}{told}:\n\n{listed}\n", durable=False)
    return f"{folder}: {what}"


def _shares(models: Sequence[str], weights: Sequence[float] | None) -> list[float]:
    """The models' weights, of sum 1."""
    weights = [1.0] * len(models) if weights is None else list(weights)
    if len(weights) != len(models):
        raise ValueError(f"weights: expected {len(models)} numbers, one a model, got {len(weights)}; leave them out for equal ones")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"weights: expected numbers above 0, got {weight!r}; leave out a model that should not count")
    return [weight / sum(weights) for weight in weights]


def _check(models: list[str], method: str, density: float, scale: float) -> None:
    if len(models) < 2:
        raise ValueError(f"expected at least two models to merge, got {len(models)}; name another one")
    twice = next((model for at, model in enumerate(models) if model in models[:at]), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice; expected each model once: say its share by weights")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}; linear is the mean")
    if method == "linear" and (density, scale) != (DENSITY, 1.0):
        raise ValueError(f"density and scale: expected method ties beside them, got {method}, a mean; leave them out")
    if not 0 < density <= 1:
        raise ValueError(f"density: expected a share above 0 and at most 1, got {density}; the paper keeps 0.2")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a number above 0, got {scale}; 1 adds the merged changes as they are")


def _check_families(models: list[str], described: list[Description]) -> None:
    first = described[0]
    for model, other in zip(models[1:], described[1:]):
        if other.backbone.name != first.backbone.name:
            raise ValueError(
                f"expected models of one family, got {models[0]} ({first.backbone.name}) and {model} ({other.backbone.name}); they have no "
                "base in common: leave one out"
            )
        fed = [name for name, value in first.processing.options.items() if other.processing.options.get(name) != value]
        if fed:
            raise ValueError(
                f"expected models that are fed alike, got other options in {models[0]} and {model}: {loading.some(fed)}; give both "
                f"the same {loading.SETTINGS}"
            )
