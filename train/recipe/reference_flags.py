"""Command lines of the VLM2Vec reference: which of its flags mean a key of the recipe, and which say what always holds.

`--key value` of this program and flags of the reference may stand in one command line. A flag that means something this
trainer does not do is refused with the reason; nothing is dropped in silence.
"""

from __future__ import annotations

import os
from typing import Any

from vlm2vec.files.documents import parse_yaml, shown

# Flag of the reference -> key of the recipe.
RENAMED = {
    "model_name": "model",
    "output_dir": "output",
    "max_steps": "steps",
    "temperature": "loss.temperature",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.targets",
    "image_encoder_freeze": "freeze_vision",
    "lr_scheduler_type": "lr_schedule",
    "dataloader_num_workers": "workers",
    "save_total_limit": "keep_checkpoints",
    "optim": "optimizer",
    "dataset_name": "data.root",
    "dataset_split": "data.split",
    "image_dir": "data.images",
    "data_basedir": "data.images",
    "max_len": "model_options.max_length",
    "num_crops": "model_options.num_crops",
    "image_resolution": "model_options.resolution",
    "resize_min_pixels": "model_options.min_pixels",
    "resize_max_pixels": "model_options.max_pixels",
}

# Flags that say what this program always does: the values that are accepted, without effect.
ALWAYS = {
    "pooling": ("eos", "last"),
    "normalize": ("true",),
    "grad_cache": ("true",),
    "remove_unused_columns": ("false",),
    "save_safetensors": ("true",),
    "interleave_stopping_strategy": ("all_exhausted",),  # sources begin again; `steps` ends the run
    "resume_from": ("auto", "none"),  # a run always goes on from its last checkpoint; --fresh begins again
}

# Flags without a meaning here, whatever their value, and why.
NEEDLESS = {
    "model_backbone": "the family is read from the model's config.json",
    "model_type": "the family is read from the model's config.json",
    "ddp_find_unused_parameters": "gradients are averaged once a step, used or not",
    "logging_dir": "the library chooses the folder of each log",
    "project_name": "set WANDB_PROJECT instead",
}

REFUSED = {
    "num_train_epochs": "a mixture of sources has no common epoch; pass --steps",
    "dataset_config": "name the mixture in the recipe: data.mixture: mmeb-v2",
    "deepspeed": "its hooks reduce gradients on every backward, of which GradCache makes many; pass --distributed fsdp",
}


def parse_overrides(words: list[str], *, ranks: int | None = None, has_lora: bool = True) -> list[tuple[str, Any]]:
    """Recipe keys and values of a command line, in its order.

    `--key value`, `--key=value`, `--key` alone (true) and `--key a b c` (a list) are understood.

    Args:
        ranks: processes among which `--per_device_train_batch_size` is the share of one; default those of this launch.
        has_lora: whether the recipe has a `lora:` section. Where it has none, `--lora` is the switch, as in the reference,
            and `--lora_r` and its like without it are refused; after `--lora false` they say nothing, as there.

    Raises:
        ValueError: for a word that is no flag, or a flag of the reference that this trainer cannot follow.
    """
    ranks = ranks if ranks is not None else int(os.environ.get("WORLD_SIZE", "1"))
    pairs: list[tuple[str, Any]] = []
    chunk_rows: list[int] = []
    flags = [(key, values, _parsed(key, values)) for key, values in _flags(words)]
    switch = [value for key, _, value in flags if key == "lora"]
    lora = switch[-1] not in (False, None) if switch else has_lora
    for key, values, value in flags:
        said = " ".join(values).lower()
        if key in REFUSED:
            raise ValueError(f"--{key} is not supported: {REFUSED[key]}")
        if key in ALWAYS:
            if said not in ALWAYS[key]:
                raise ValueError(f"--{key} {said} is not supported; this trainer always uses {ALWAYS[key][0]}")
        elif key in NEEDLESS:
            continue
        elif RENAMED.get(key, "").startswith("lora.") and not lora:
            if not switch:
                raise ValueError(f"--{key} without --lora in a recipe without `lora:` would train all weights; add --lora, or leave it out")
        elif key == "lora":
            pairs.append((key, {} if value is True else None if value is False else value))
        elif key in ("bf16", "fp16"):
            pairs.append(("autocast", {"bf16": "bfloat16", "fp16": "float16"}[key] if value else None))
        elif key in ("gc_q_chunk_size", "gc_p_chunk_size"):
            chunk_rows.append(_whole(key, value))
        elif key == "per_device_train_batch_size":
            pairs.append(("global_batch", _whole(key, value) * ranks))
        elif key == "subset_name":
            pairs.append(("data.sources", [{"name": name} for name in (value if isinstance(value, list) else [value])]))
        elif key == "num_sample_per_subset":
            pairs.append(("data.rows", _whole(key, value)))
        else:
            pairs.append((RENAMED.get(key, key), value))
    if chunk_rows:
        # One size serves both sides here. The smaller keeps within the memory that either was chosen for; gradients
        # do not depend on it.
        pairs.append(("chunk_rows", min(chunk_rows)))
    return pairs


def _flags(words: list[str]) -> list[tuple[str, list[str]]]:
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            flags.append((key, [value] if equals else []))
        elif not flags:
            raise ValueError(f"expected --key value, got {word!r}")
        else:
            flags[-1][1].append(word)
    return [(key, values or ["true"]) for key, values in flags]


def _parsed(key: str, values: list[str]) -> Any:
    parsed = [parse_yaml(value, f"--{key}: expected a number, a word or a list, got {shown(value)}") for value in values]
    return parsed[0] if len(parsed) == 1 else parsed


def _whole(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"--{key} must be a whole number above 0, got {shown(value)}")
    return value
