"""What a model folder's files must be before a library reads them: JSON objects of the right shape, sizes that fit the weights.

Libraries raise what they like for a damaged file, fill what lacks with a 7B model's defaults, and load pickles; here the file and the
key are named first.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from vlm2vec.files.documents import kind, read_object, require_regular

JSON_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "generation_config.json",
    "vocab.json",
)
LARGE = ("tokenizer.json", "vocab.json")  # looked at where a library has failed on them
INDEX = "model.safetensors.index.json"
PICKLES = re.compile(r"(pytorch_model|model|consolidated)[^/]*\.(bin|pt|pth)")
# Sizes that a configuration may name, in any section, each an integer of at least 1.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
    "max_position_embeddings",
    "depth",
    "embed_dim",
    "num_heads",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "image_size",
    "in_channels",
)


def check_settings(path: str, settings: dict) -> None:
    """ValueError for a vlm2vec.json whose family, options or prompts are of another kind."""
    family, prompts = settings.get("family"), settings.get("prompts", {})
    if not isinstance(family, (str, type(None))):
        raise ValueError(f"{path}: family should be a name, got {kind(family)}")
    if not isinstance(settings.get("options", {}), dict):
        raise ValueError(f"{path}: options should be an object, got {kind(settings['options'])}")
    if not isinstance(prompts, dict):
        raise ValueError(f"{path}: prompts should be an object of texts, got {kind(prompts)}")
    for name, text in prompts.items():
        if not isinstance(text, str):
            raise ValueError(f"{path}: prompts should be texts, got {kind(text)} for {name[:40]!r}")


def check_config(source: str, raw: dict, sections: tuple[str, ...]) -> None:
    """ValueError for a config.json without its sections, or with sizes that no model has.

    Args:
        sections: names that must be there as objects; a flat config.json, as older text configurations are, stands for text_config.
    """
    where = f"{source}: config.json"
    for name in sections:
        if name == "text_config" and name not in raw and "hidden_size" in raw:
            continue
        if not isinstance(raw.get(name), dict):
            what = f"has {kind(raw[name])} for {name}" if name in raw else f"has no {name}"
            raise ValueError(f"{where} {what}, an object that says the model's sizes; copy the file again from the model's own folder")
    parts = [("", raw), *((f"{name}.", part) for name, part in raw.items() if isinstance(part, dict))]
    for prefix, part in parts:
        for name in SIZES:
            value = part.get(name)
            if value is None or isinstance(value, (list, dict)):  # a size for each layer or side
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{where}: {prefix}{name} should be an integer of at least 1, got {kind(value)}")


def check_adapter_config(path: str, adapter: dict) -> None:
    """ValueError for an adapter_config.json with a value of another kind than PEFT writes."""
    number = (int, float)
    for name, types, wanted in (
        ("peft_type", str, "a text"),
        ("base_model_name_or_path", str, "a text"),
        ("revision", str, "a text"),
        ("rank_pattern", dict, "an object"),
        ("alpha_pattern", dict, "an object"),
        ("lora_alpha", number, "a number"),
        ("lora_dropout", number, "a number"),
    ):
        value = adapter.get(name)
        if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
            raise ValueError(f"{path}: {name} should be {wanted}, got {kind(value)}")
    rank = adapter.get("r", 8)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{path}: r should be an integer of at least 1, got {kind(rank)}")


def check_processor_files(source: str) -> None:
    """ValueError for a local folder's small JSON files of another shape, or an image processor whose numbers make no pixels."""
    for name in JSON_FILES if os.path.isdir(source) else ():
        path = os.path.join(source, name)
        if name in LARGE or not os.path.lexists(path):
            continue
        content = read_object(path)
        if name in ("processor_config.json", "preprocessor_config.json"):
            nested = content.get("image_processor", {})
            if not isinstance(nested, dict):
                raise ValueError(f"{path}: image_processor should be an object, got {kind(nested)}")
            _check_pixels(path, {**content, **nested})


def _check_pixels(path: str, settings: dict) -> None:
    for name in ("image_mean", "image_std"):
        value = settings.get(name)
        numbers = value if isinstance(value, list) else [value]
        fits = len(numbers) in (1, 3) and all(is_number(n) and (n > 0 or name == "image_mean") for n in numbers)
        if value is not None and not fits:
            wanted = "three numbers" if name == "image_mean" else "three numbers above 0"
            raise ValueError(f"{path}: {name} should be {wanted}, got {json.dumps(value)[:60]}")
    if "rescale_factor" in settings and settings.get("do_rescale", True) and not is_number(settings["rescale_factor"]):
        raise ValueError(f"{path}: rescale_factor should be a number such as 1/255 = 0.00392, got {kind(settings['rescale_factor'])}")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@contextlib.contextmanager
def naming(source: str, what: str) -> Iterator[None]:
    """Around a library that reads a model's files: whatever it raises becomes a ValueError that names the file, as far as one is to blame.

    Our own ValueErrors, which name it already, pass: those that hold the source.
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, ValueError) and source in str(e):
            raise
        for name in JSON_FILES if os.path.isdir(source) else ():
            path = os.path.join(source, name)
            if os.path.lexists(path):
                read_object(path)
        reason = " ".join(str(e).split())[:200]
        raise ValueError(
            f"{source}: {what} cannot be read ({type(e).__name__}: {reason}); copy it again from the model's own folder"
        ) from e


def check_weights(source: str, config: Any) -> None:
    """What can be said of a local folder's weights without reading them.

    Raises:
        ValueError: pickled weights, an index that names no files of the folder, or sizes other than those of `config`.
    """
    if not os.path.isdir(source):
        return
    names = sorted(os.listdir(source))
    if INDEX in names:
        files = _indexed(source)
    elif "model.safetensors" in names:
        files = ["model.safetensors"]
    else:
        pickled = [name for name in names if PICKLES.fullmatch(name)]
        if pickled:
            raise ValueError(
                f"{source}: its weights are pickles ({pickled[0]}), which run code when they are read, and are not read here; "
                "take the model's safetensors files, or let its publisher convert them"
            )
        raise ValueError(f"{source}: the weights cannot be loaded: neither model.safetensors nor {INDEX} is there; copy them again")
    _check_sizes(source, files, config)


def _indexed(source: str) -> list[str]:
    path = os.path.join(source, INDEX)
    index = read_object(path)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{path} has no weight_map, an object of weights and their files; copy it again")
    for weight, name in places.items():
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise ValueError(f"{path}: weight_map should name files beside it, got {kind(name)} for {weight[:60]}")
        if not os.path.isfile(os.path.join(source, name)):
            raise ValueError(f"{path} names {name}, which is not there; copy the shard again")
    if not isinstance(index.get("metadata", {}), dict):
        raise ValueError(f"{path}: metadata should be an object, got {kind(index['metadata'])}")
    return sorted(set(places.values()))


def _check_sizes(source: str, files: list[str], config: Any) -> None:
    """The decoder's width, vocabulary and depth as config.json says them and as the weights have them."""
    from safetensors import SafetensorError, safe_open

    layers: dict[str, set[int]] = {}
    table = None
    try:
        for name in files:
            require_regular(os.path.join(source, name))
            with safe_open(os.path.join(source, name), "pt") as held:
                for weight in held.keys():
                    stem, found, rest = weight.partition(".layers.")
                    number = rest.partition(".")[0]
                    if found and number.isdecimal():
                        layers.setdefault(stem, set()).add(int(number))
                    if weight.endswith("embed_tokens.weight") and "vision" not in weight:
                        table = (weight.removesuffix(".embed_tokens.weight"), held.get_slice(weight).get_shape())
    except SafetensorError as e:
        raise ValueError(f"{source}: the weights cannot be loaded ({name}: {' '.join(str(e).split())[:200]}); copy the file again") from e
    text = config.get_text_config()
    if table is None or not isinstance(getattr(text, "hidden_size", None), int):
        return
    stem, (vocabulary, width) = table
    depth = len(layers[stem]) if stem in layers else None
    told = {"hidden_size": (text.hidden_size, width), "vocab_size": (getattr(text, "vocab_size", None), vocabulary)}
    told["num_hidden_layers"] = (getattr(text, "num_hidden_layers", None), depth)
    other = [f"{name} {said}, the weights have {has}" for name, (said, has) in told.items() if None not in (said, has) and said != has]
    if other:
        raise ValueError(f"{source}: config.json (text_config) says {'; '.join(other)}; take config.json and weights from one folder")
