"""Recipes: what a training run is, as a YAML file plus `--key value` overrides, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Source:
    """One data set of the mixture: `name` is its folder (or hub config); `rows` takes its first rows only."""

    name: str
    weight: float = 1.0
    rows: int | None = None


@dataclass
class Data:
    """Where the training rows are: a local folder in MMEB's layout or a hub data set, and the folder of their images."""

    root: str
    images: str
    sources: list[Source]
    split: str = "original"
    hard_negatives: bool = False
    strict: bool = False  # a row that cannot be read stops the run; otherwise it is logged and left out of the loss


@dataclass
class Loss:
    """Options of `contrastive_kernels.info_nce`; see there."""

    temperature: float = 0.02
    symmetric: bool = False
    mask_duplicates: bool = True  # a target equal to a query's positive is no negative of it
    hardness: float = 0.0
    label_smoothing: float = 0.0
    matryoshka_dims: list[int] | None = None
    query_negatives: bool = False
    target_negatives: bool = False


@dataclass
class Lora:
    """A PEFT adapter; `dora=True` adds the magnitude vectors that the published VLM2Vec adapters have."""

    r: int = 16
    alpha: float = 64.0
    dropout: float = 0.1
    dora: bool = True
    targets: list[str] | None = None


@dataclass
class Recipe:
    """A whole run. `model`: hub name or folder; `output`: folder of checkpoints and of the trained model."""

    model: str
    output: str
    data: Data
    steps: int
    global_batch: int
    interleave_batch_size: int | None = None  # rows drawn from one source in a row; default: the global batch
    chunk_tokens: int = 8192
    retain: int | str = 0
    retain_mib: float | None = None
    keep_mib: float = 4096.0
    loss: Loss = field(default_factory=Loss)
    lora: Lora | None = None
    quantization: str | None = None  # "nf4": the frozen base in four bits (QLoRA)
    freeze_vision: bool = False
    dtype: str = "float32"  # of the weights
    autocast: str | None = None  # "bfloat16": matrix products in bf16, weights and loss in `dtype`
    learning_rate: float = 2e-5
    lr_schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch"
    gradient_checkpointing: bool = False
    model_options: dict[str, Any] = field(default_factory=dict)
    workers: int = 0
    seed: int = 0
    save_steps: int = 100
    keep_checkpoints: int = 2
    logging_steps: int = 10
    report_to: list[str] = field(default_factory=list)
    cpu: bool = False

    def __post_init__(self) -> None:
        if self.interleave_batch_size is None:
            self.interleave_batch_size = self.global_batch
        self.check()

    def check(self) -> None:
        """Raises ValueError for what cannot run, before a model is loaded."""
        for key in ("steps", "global_batch", "interleave_batch_size", "chunk_tokens", "save_steps", "logging_steps", "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.global_batch % self.interleave_batch_size:
            raise ValueError(
                f"interleave_batch_size ({self.interleave_batch_size}) must divide global_batch ({self.global_batch}): "
                "a step is made of whole blocks, each from one source"
            )
        if self.loss.temperature <= 0:
            raise ValueError(f"loss.temperature must be above 0, got {self.loss.temperature}")
        if not self.data.sources:
            raise ValueError("data.sources names no data set; give at least one {name: ...}")
        if self.quantization not in (None, "nf4"):
            raise ValueError(f'quantization must be "nf4" or left out, got {self.quantization!r}')
        if self.quantization and self.lora is None:
            raise ValueError("quantised weights cannot be trained in full; add a `lora:` section or drop `quantization`")
        for key in ("dtype", "autocast"):
            value = getattr(self, key)
            if value not in ("float32", "bfloat16", "float16", "float64") and not (key == "autocast" and value is None):
                raise ValueError(f"{key} must be float32, bfloat16, float16 or float64, got {value!r}")
        if self.retain not in ("all", "auto") and not (isinstance(self.retain, int) and self.retain >= 0):
            raise ValueError(f'retain must be a number of chunks, "all" or "auto", got {self.retain!r}')
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) exceeds steps ({self.steps})")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


# Flags of the reference's command line, where they mean the same here.
_REFERENCE_FLAGS = {
    "model_name": "model",
    "output_dir": "output",
    "max_steps": "steps",
    "temperature": "loss.temperature",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.targets",
    "dataloader_num_workers": "workers",
    "lr_scheduler_type": "lr_schedule",
    "image_dir": "data.images",
    "save_total_limit": "keep_checkpoints",
}
# Flags that say what this program always does: accepted, checked, and without effect.
_REFERENCE_CONSTANTS = {"pooling": ("eos", "last"), "normalize": ("true",), "grad_cache": ("true",)}


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Reads a recipe and applies `--key value` pairs (nested keys with dots: `--loss.temperature 0.05`).

    Raises:
        ValueError: for a file that is not a recipe, an unknown key (with the nearest known one), a value of the wrong
            type, or a recipe that contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"recipe {path} is not a file; recipes of the project are in train/recipes/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} must be a mapping of keys to values, got {type(values).__name__}")
    for key, value in _parse_overrides(overrides):
        _assign(values, key, value)
    return _build(Recipe, values, where="")


def _parse_overrides(words: list[str]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--"):
            raise ValueError(f"expected --key value, got {word!r}")
        key, _, value = word[2:].partition("=")
        position += 1
        if not value:
            if position < len(words) and not words[position].startswith("--"):
                value = words[position]
                position += 1
            else:
                value = "true"
        if key in _REFERENCE_CONSTANTS:
            if value.lower() not in _REFERENCE_CONSTANTS[key]:
                raise ValueError(f"--{key} {value} is not supported; this trainer always uses {_REFERENCE_CONSTANTS[key][0]}")
            continue
        if key == "lora":
            pairs.append((key, {} if value.lower() == "true" else None))
        elif key == "bf16":
            pairs.append(("autocast", "bfloat16" if value.lower() == "true" else None))
        elif key in ("gc_q_chunk_size", "gc_p_chunk_size"):
            raise ValueError(f"--{key} counts rows; chunks here hold tokens, so that length is accounted for: pass --chunk_tokens")
        else:
            pairs.append((_REFERENCE_FLAGS.get(key, key), yaml.safe_load(value)))
    return pairs


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ValueError(f"--{key}: {parent} is not a section of the recipe")
    if last == "lora" and isinstance(values.get("lora"), dict) and value == {}:
        return  # --lora on a recipe that has the section already
    values[last] = value


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'the recipe'} must be a mapping, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"; did you mean {where}{near[0]}?" if near else f"; known keys: {', '.join(fields)}"
            raise ValueError(f"unknown recipe key {where}{key}{hint}")
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"the recipe lacks {', '.join(where + name for name in missing)}")
    return cls(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        errors = []
        for option in (a for a in arguments if a is not type(None)):
            try:
                return _convert(option, value, where)
            except ValueError as error:
                errors.append(error)
        raise errors[0]
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{where}.")
    if origin is list:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}")
        return [_convert(arguments[0], entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {value!r}")
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 2e-5 as a string
        except ValueError:
            raise ValueError(f"{where} must be a number, got {value!r}") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be of type {hint.__name__}, got {value!r}")
    return value
