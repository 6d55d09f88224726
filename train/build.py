"""The model that a recipe trains: loaded once, from the checkpoint when resuming, with its adapter and what is frozen."""

from __future__ import annotations

from pathlib import Path

import torch

from vlm2vec.checkpoint import adapters
from vlm2vec.model import VLM2Vec

from .recipe.schema import Recipe

NO_LORA_SECTION = (
    "is an adapter and the recipe has no `lora:` section; add one to train the adapter further, "
    "or save a merged model (save_pretrained(folder, merge=True)) to train all weights"
)


def build_model(recipe: Recipe, checkpoint: Path | None = None, device=None) -> VLM2Vec:
    """Loads `recipe.model`, or a checkpoint of its run, and makes trainable what the recipe trains.

    Raises:
        ValueError: where the recipe asks for what the model does not have, with the mend.
    """
    model = VLM2Vec.from_pretrained(
        str(checkpoint or recipe.model),
        dtype=getattr(torch, recipe.dtype),
        device=device,
        quantize=recipe.quantization,
        **recipe.model_options,
    )
    prepare(model, recipe)
    return model


def prepare(model: VLM2Vec, recipe: Recipe) -> None:
    """Makes trainable what the recipe trains; gradient checkpointing where it asks for it."""
    whole = _whole(model, recipe)
    if recipe.lora is not None:
        _adapt(model, recipe, whole)
    elif adapters.has_adapter(model):
        raise ValueError(f"{recipe.model} {NO_LORA_SECTION}")
    elif recipe.train is not None:
        names = set(whole)
        for name, parameter in model.model.named_parameters():
            parameter.requires_grad_(name in names)
    if recipe.freeze_vision:
        tower = model.backbone.vision_tower(model.model)
        if tower is None:
            raise ValueError(f"freeze_vision: {recipe.model} has no vision tower of its own; leave the key out")
        tower.requires_grad_(False)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()


def _whole(model: VLM2Vec, recipe: Recipe) -> list[str]:
    """Names of the parameters that `train` makes trainable themselves."""
    if recipe.train is None:
        return []
    parts = model.backbone.parts(model.model)
    chosen = list(parts) if "all" in recipe.train else recipe.train
    empty = [part for part in chosen if not parts[part]]
    if empty and "all" not in recipe.train:
        held = ", ".join(part for part in parts if parts[part])
        raise ValueError(f"train: {recipe.model} has no {empty[0]} of its own; expected some of {held}: leave it out")
    return [name for part in chosen for name in parts[part]]


def _adapt(model: VLM2Vec, recipe: Recipe, whole: list[str]) -> None:
    """A fresh adapter, or the loaded one where the model already has one: a checkpoint's, or a published one's."""
    lora = recipe.lora
    if not adapters.has_adapter(model):
        targets = lora.targets or adapters.REFERENCE_TARGETS
        targets = targets[0] if len(targets) == 1 and targets[0] == "all-linear" else targets
        vision = False if recipe.freeze_vision else lora.vision
        model.add_adapter(r=lora.r, alpha=lora.alpha, dropout=lora.dropout, dora=lora.dora, targets=targets, vision=vision, whole=whole)
    else:
        had = model.adapter_settings
        asked = {"r": lora.r, "lora_alpha": lora.alpha, "use_dora": lora.dora}
        other = [f"{name} {had[name]}" for name, value in asked.items() if had[name] != value]
        if other:
            raise ValueError(
                f"the adapter of {recipe.model} has {', '.join(other)}; say the same in the recipe's `lora:` section to train it "
                "further, or merge it first to train a new one"
            )
    if whole:
        adapters.train_whole(model, whole, _modules_of(model, whole))


def _modules_of(model: VLM2Vec, names: list[str]) -> list[str]:
    """Last parts of the names of the outermost modules whose parameters are all among `names`."""
    inside, found, covered = set(names), [], set()
    for name, module in model.model.named_modules():
        own = [f"{name}.{rest}" for rest, _ in module.named_parameters() if ".lora_" not in f"{name}.{rest}"]
        if name and own and inside.issuperset(own) and not covered.intersection(own):
            covered.update(own)
            found.append(name.rpartition(".")[2])
    return found


def vision_is_frozen(model: VLM2Vec) -> bool:
    """Whether the vision tower is apart from the rest and nothing of it is trained: it then runs once a step."""
    tower = model.backbone.vision_tower(model.model)
    return tower is not None and not any(p.requires_grad for p in tower.parameters())


def trained_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Numbers (trained, all) of the model's weights; four-bit weights count as the weights they stand for."""
    trained = total = 0
    for parameter in model.parameters():
        count = parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total
