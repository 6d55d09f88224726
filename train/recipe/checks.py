"""What makes a recipe impossible on any machine: values out of range, options that contradict each other, what is not installed.

`train.preflight` holds a recipe against the machine, the model and the data at hand.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import os

from vlm2vec.data.row_formats import FORMATS
from vlm2vec.files.documents import shown

from ..losses import Loss
from .keys import RecipeKeys, Source
from .own_data import check_own

# Those of the library's that need nothing but the steps and the warm-up.
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")
# Module that an optimizer comes in, by a part of its name; the first that fits counts.
_OPTIMIZER_MODULES = {
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "stable_adamw": "optimi",
    "anyprecision": "torchdistx",
    "torch_4bit": "torchao",
    "torch_8bit": "torchao",
    **dict.fromkeys(("8bit", "paged", "bnb", "lion", "ademamix"), "bitsandbytes"),
}
# Modules of the places to report to, where they bear another name; one of them is enough.
_REPORTER_MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "azure_ml": ("azureml",), "flyte": ("flytekit",)}
_COUNTS = (
    "steps",
    "global_batch",
    "interleave_batch_size",
    "chunk_tokens",
    "save_steps",
    "logging_steps",
    "keep_checkpoints",
    "decode_threads",
    "chunk_rows",
    "profile",
)
_NOT_NEGATIVE = ("retain_mib", "keep_mib", "media_mib", "workers", "warmup_steps", "weight_decay", "max_grad_norm")


# What no run has had a use for, and a slip of the hand has: more forks processes without end, fills memory, or makes weights infinite.
_MOST = {"steps": 10**10, "global_batch": 10**7, "workers": 1024, "decode_threads": 1024, "learning_rate": 100.0, "weight_decay": 100.0}
_TEMPERATURES = (1e-4, 100.0)
PARTS = ("language", "vision", "projector", "all")


def check(recipe: RecipeKeys) -> None:
    """Raises ValueError for the first thing that cannot run: what was expected, what is there, and the mend."""
    _check_numbers(recipe)
    _check_data(recipe)
    _check_loss(recipe)
    _check_parts(recipe)
    _check_memory(recipe)
    _check_optimizer(recipe)
    _check_reports(recipe)


def _check_numbers(recipe: RecipeKeys) -> None:
    if recipe.held_out is not None and min(recipe.held_out.rows, recipe.held_out.steps) < 1:
        rows, steps = recipe.held_out.rows, recipe.held_out.steps
        raise ValueError(
            f"held_out.rows and held_out.steps must be at least 1, got {rows} and {steps}; leave the section out to train on all rows"
        )
    for key in _COUNTS:
        value = getattr(recipe, key)
        if value is not None and value < 1:
            raise ValueError(f"{key} must be at least 1, got {shown(value)}")
    for key in _NOT_NEGATIVE:
        value = getattr(recipe, key)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{key} must be 0 or more, got {shown(value)}")
    for key, most in _MOST.items():
        if getattr(recipe, key) > most:
            raise ValueError(f"{key} must be at most {most:,}, got {shown(getattr(recipe, key))}")
    if not 0 <= recipe.seed < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {shown(recipe.seed)}")
    if not 0 < recipe.learning_rate < math.inf:
        raise ValueError(f"learning_rate must be above 0, got {recipe.learning_rate}; 2e-5 is usual")
    if recipe.global_batch % recipe.interleave_batch_size:
        raise ValueError(
            f"interleave_batch_size ({recipe.interleave_batch_size}) must divide global_batch ({recipe.global_batch}): "
            "a step is made of whole blocks, each from one source"
        )
    if recipe.profile is not None and recipe.profile > recipe.steps:
        raise ValueError(f"profile ({recipe.profile}) is beyond the last step ({recipe.steps}); name one from 1 to {recipe.steps}")
    if recipe.warmup_steps > recipe.steps:
        raise ValueError(f"warmup_steps ({recipe.warmup_steps}) exceeds steps ({recipe.steps})")
    if recipe.lr_schedule not in SCHEDULES:
        raise ValueError(f"lr_schedule {recipe.lr_schedule!r} is unknown; {_nearest(recipe.lr_schedule, SCHEDULES)}")


def _check_data(recipe: RecipeKeys) -> None:
    sources = recipe.data.sources
    for place in ("model", "output"):
        if not getattr(recipe, place).strip() or "\0" in getattr(recipe, place):
            raise ValueError(f"{place} must be the name of a folder, got {shown(getattr(recipe, place))}")
    if recipe.data.root is not None and not recipe.data.root.strip():
        raise ValueError("data.root is empty; name the folder of the data sets, or a data set of the hub")
    if not sources:
        raise ValueError("data.sources names no data set; give at least one {name: ...}, or data.mixture: mmeb-v1")
    told = [(s.name, s.root, s.split, s.file, s.format, s.path, s.config, str(s.query), str(s.target)) for s in sources]
    twice = next((one[0] for one in told if told.count(one) > 1), None)
    if twice is not None:
        raise ValueError(f"data.sources names {shown(twice)} twice; give its share by weight")
    taken = [("model", recipe.model), ("data.root", recipe.data.root), ("data.images", recipe.data.images)]
    taken += [(f"source {s.name}'s {key}", getattr(s, key)) for s in sources for key in ("path", "images") if getattr(s, key)]
    for key, folder in taken:
        if folder and os.path.realpath(recipe.output) == os.path.realpath(folder):
            raise ValueError(f"output and {key} are one folder, {recipe.output}, whose files would be replaced; choose another output")
    for source in sources:
        if source.format not in FORMATS:
            raise ValueError(f"source {source.name}: format {source.format!r} is none of {', '.join(FORMATS)}")
        check_own(source, recipe.data)
        if not 0 < source.weight < math.inf:
            raise ValueError(f"source {source.name}: weight must be above 0, got {source.weight}; leave the source out instead")
        if source.rows is not None and source.rows < 1:
            raise ValueError(f"source {source.name}: rows must be at least 1, got {source.rows}; leave the source out instead")
        if source.from_step < 0:
            raise ValueError(f"source {source.name}: from_step must be 0 or more, got {source.from_step}")
    if recipe.data.rows is not None and recipe.data.rows < 1:
        raise ValueError(f"data.rows must be at least 1, got {recipe.data.rows}")
    if all(source.from_step for source in sources):
        raise ValueError("every source has a from_step above 0, so the first step has no rows; give one of them from_step: 0")


def _check_loss(recipe: RecipeKeys) -> None:
    sources = recipe.data.sources
    general = recipe.loss if isinstance(recipe.loss, list) else [recipe.loss]
    if not general:
        raise ValueError("loss lists no section; expected at least one, such as {name: info_nce, temperature: 0.02}")
    _check_sections("loss", recipe.loss, [source for source in sources if source.loss is None], recipe)
    for at, source in enumerate(sources):
        if source.loss is not None:
            _check_sections(f"data.sources[{at}].loss", source.loss, [source], recipe)
    for where, loss in _sections(recipe):
        if loss.tells_sources:
            require_own_names(sources, f"{where} ({loss.name})")
    if recipe.data.hard_negatives and not any(loss.takes_hard_negatives for _, loss in _sections(recipe)):
        raise ValueError(f"data.hard_negatives: {general[0].name} has no place for them; leave the key out, or choose loss.name: info_nce")


def require_own_names(sources: list[Source], who: str) -> None:
    """ValueError where two sources share a name, by which `who` tells them."""
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"data.sources: expected a name of its own for each, by which {who} tells them, got {shown(twice)} twice; rename one and its "
            "folder, or give its `file`"
        )


def _sections(recipe: RecipeKeys) -> list[tuple[str, Loss]]:
    """(where it stands, section) of the recipe's sections and of its sources' own."""
    told = [("loss", recipe.loss)] + [(f"data.sources[{at}].loss", source.loss) for at, source in enumerate(recipe.data.sources)]
    found = []
    for where, sections in told:
        if isinstance(sections, list):
            found += [(f"{where}[{at}]", loss) for at, loss in enumerate(sections)]
        elif sections is not None:
            found.append((where, sections))
    return found


def _check_sections(where: str, sections: Loss | list[Loss], sources: list[Source], recipe: RecipeKeys) -> None:
    """Sections that stand at `where`, for the rows of `sources`."""
    if isinstance(sections, list) and not sections:
        raise ValueError(f"{where} lists no section; expected at least one, such as {{name: info_nce}}, or leave the key out")
    low, high = _TEMPERATURES
    for at, loss in enumerate(sections if isinstance(sections, list) else [sections]):
        place = f"{where}[{at}]" if isinstance(sections, list) else where
        temperature = getattr(loss, "temperature", None)
        temperature = getattr(temperature, "start", temperature)
        if isinstance(temperature, float) and temperature > 0 and not low <= temperature <= high:
            raise ValueError(
                f"{place}.temperature must be from {low:g} to {high:g}, got {temperature}; it divides cosines, and 0.02 is usual"
            )
        if not 0 < loss.weight < math.inf:
            raise ValueError(f"{place}.weight must be above 0, got {loss.weight}; leave the section out instead")
        try:
            loss.check()
        except ValueError as error:
            raise ValueError(f"{place}.{str(error).removeprefix('loss.')}") from None
        if getattr(loss, "own_negatives_only", False) and not recipe.data.hard_negatives:
            raise ValueError(
                f"{place}.own_negatives_only: expected data.hard_negatives: true, got false, and its rows would have no negatives; say so"
            )
        for source in sources:
            column = loss.needs_column
            if column is not None and getattr(source, column) is None:
                raise ValueError(
                    f"source {source.name}: loss {loss.name} needs the column that holds its {column}, got none; say {column}: COLUMN"
                )
        if loss.needs_negatives and not recipe.data.hard_negatives:
            raise ValueError(f"{place}: {loss.name} compares a row's positive with its hard negatives; say data.hard_negatives: true")


def _check_parts(recipe: RecipeKeys) -> None:
    """Which towers train: `train` beside `lora`, `freeze_vision` and `quantization`."""
    if recipe.train is None:
        return
    for part in recipe.train or [""]:
        if part not in PARTS:
            raise ValueError(f"train: {shown(part)} is none of {', '.join(PARTS)}; {_nearest(part, PARTS)}")
    lora, trains = recipe.lora, set(recipe.train)
    every = "all" in trains or trains >= set(PARTS) - {"all"}
    if recipe.freeze_vision:
        raise ValueError("train and freeze_vision both say whether the vision tower trains; expected one of them: drop freeze_vision")
    if lora is not None and every:
        raise ValueError("train: all and lora contradict each other, since nothing is left to adapt; drop one of them")
    if lora is not None and lora.vision and "vision" in trains:
        raise ValueError("train: vision and lora.vision contradict each other: a tower is trained itself or adapted; drop one of them")
    if recipe.quantization and (every or "language" in trains):
        raise ValueError("train: language and quantization contradict each other: weights in four bits cannot be trained; drop one of them")


def _check_memory(recipe: RecipeKeys) -> None:
    """How weights, gradients and graphs are held: adapters, four bits, shards, dtypes, chunks."""
    lora = recipe.lora
    if recipe.quantization not in (None, "nf4"):
        raise ValueError(f'quantization must be "nf4" or left out, got {recipe.quantization!r}')
    if recipe.quantization and lora is None:
        raise ValueError("quantised weights cannot be trained in full; add a `lora:` section or drop `quantization`")
    if recipe.quantization and recipe.distributed == "fsdp":
        raise ValueError('four-bit weights cannot be sharded here; drop `quantization`, or train with distributed: "ddp"')
    if recipe.distributed not in ("ddp", "fsdp"):
        raise ValueError(f'distributed must be "ddp" or "fsdp", got {recipe.distributed!r}')
    if lora is not None and (lora.r < 1 or not 0 <= lora.dropout < 1):
        raise ValueError(f"lora.r must be at least 1 and lora.dropout in [0, 1), got {lora.r} and {lora.dropout}")
    if lora is not None and lora.r > 2**16:
        raise ValueError(f"lora.r must be at most {2**16:,}, got {shown(lora.r)}; 8 to 64 are usual")
    if lora is not None and lora.targets is not None and not lora.targets:
        raise ValueError("lora.targets names no layers; leave it out for the reference's")
    if lora is not None and not 0 < lora.alpha <= 1e6:
        raise ValueError(f"lora.alpha must be a number above 0 and at most 1e6, got {lora.alpha}; twice lora.r is usual")
    if lora is not None and recipe.freeze_vision and lora.vision:
        raise ValueError("freeze_vision and lora.vision contradict each other: an adapted tower is trained; drop one of them")
    longest = recipe.model_options.get("max_length")
    if longest is not None and recipe.chunk_rows is None and recipe.chunk_tokens < longest:
        raise ValueError(
            f"chunk_tokens ({recipe.chunk_tokens}) is below the longest sample (model_options.max_length {longest}); "
            "raise the one or lower the other"
        )
    if recipe.dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {recipe.dtype!r}")
    if recipe.autocast not in (None, "bfloat16", "float16"):
        raise ValueError(f"autocast must be bfloat16, float16 or left out, got {recipe.autocast!r}")
    if recipe.autocast == "float16" and recipe.distributed == "fsdp":
        raise ValueError("autocast: float16 scales gradients, sharded ones are not scaled; choose autocast: bfloat16, or distributed: ddp")
    if recipe.autocast == "float16" and recipe.dtype == "float16" and lora is None:
        raise ValueError("gradients of float16 weights cannot be unscaled; with autocast: float16 choose dtype: float32")
    if recipe.autocast == "float16" and recipe.cpu:
        raise ValueError("autocast: float16 needs a GPU; with cpu: true choose autocast: bfloat16, or leave it out")
    if recipe.retain not in ("all", "auto") and not (isinstance(recipe.retain, int) and recipe.retain >= 0):
        raise ValueError(f'retain must be a number of chunks, "all" or "auto", got {recipe.retain!r}')
    if recipe.retain == "auto" and recipe.retain_mib is None and recipe.cpu:
        raise ValueError("retain: auto measures free GPU memory, and cpu is true; give retain_mib, or a number of chunks to retain")
    if recipe.retain == "auto" and recipe.retain_mib is None and recipe.offload_activations:
        raise ValueError(
            "retain: auto and offload_activations contradict each other: auto keeps as many graphs as free GPU memory holds, but offloaded "
            "ones wait in host memory, which it does not measure; give retain_mib (MiB of host memory for them), a number of chunks to "
            "retain, or drop offload_activations"
        )


def _check_optimizer(recipe: RecipeKeys) -> None:
    from transformers.training_args import OptimizerNames

    known = [name.value for name in OptimizerNames]
    name = recipe.optimizer
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "adamw_torch, adamw_8bit and paged_adamw_8bit are usual"
        raise ValueError(f"optimizer {name!r} is unknown; {hint}")
    if recipe.distributed == "fsdp" and any(kind in name for kind in ("8bit", "4bit", "paged")):
        raise ValueError(f"{name} does not take sharded weights; choose adamw_torch, or distributed: ddp")
    module = next((module for part, module in _OPTIMIZER_MODULES.items() if part in name), None)
    if module is not None and importlib.util.find_spec(module) is None:
        raise ValueError(f"optimizer {name} needs {module}; pip install {module.replace('_', '-')}, or choose adamw_torch")


def _check_reports(recipe: RecipeKeys) -> None:
    if not recipe.report_to:
        return
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in recipe.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to: {name!r} is unknown; {_nearest(name, list(INTEGRATION_TO_CALLBACK))}")
        modules = _REPORTER_MODULES.get(name, (name,))
        if not any(importlib.util.find_spec(module) for module in modules):
            raise ValueError(f"report_to: {name} is not installed; pip install {modules[0].replace('_', '-')}, or pass --report_to none")


def _nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
