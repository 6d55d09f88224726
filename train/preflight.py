"""A recipe against the machine, the model and the data at hand, before a weight is read: what cannot train is refused here.

Costs a second or two: weights are counted over fake tensors, pictures are measured by their headers.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vlm2vec.checkpoint.pretrained import Description, describe

from .build import NO_LORA_SECTION, vision_is_frozen
from .command import COMMAND
from .data.rows import PairDataset, collate, longest_sample
from .data.unreadable_rows import unreadable
from .optimizers import state_bytes
from .plan.machine import Memory, device_memory
from .recipe.schema import Recipe

logger = logging.getLogger(__name__)

_GIB = 2**30
_SAMPLED_ROWS = 256
_SAMPLED_ROWS_DECODED = 64  # where a family has to decode a picture to know its tokens
_ROWS_LOOKED_UP = 10_000  # in what the loss needs of them: no data is read
_ROWS_OF_A_SOURCE = 8  # fewer, and a damaged few could be all of them


def check(recipe: Recipe, *, ranks: int = 1, resumed: bool = False) -> None:
    """Raises ValueError for a recipe that cannot run here, with the mend.

    Args:
        ranks: processes of the run.
        resumed: the rows were looked at when the run began.
    """
    on_gpu = torch.cuda.is_available() and not recipe.cpu
    _check_machine(recipe, on_gpu)
    model = describe(recipe.model, options=recipe.model_options)
    if model.adapter is not None and recipe.lora is None:
        raise ValueError(f"{recipe.model} {NO_LORA_SECTION}")
    width = model.backbone.embedding_dim(model.config)
    recipe.objective.check_width(width, recipe.model)
    check_memory(recipe, model, device_memory(on_gpu), ranks=ranks, on_gpu=on_gpu)
    if not resumed:
        check_rows(recipe, model.processing)


def _check_machine(recipe: Recipe, on_gpu: bool) -> None:
    cores = os.cpu_count() or 1
    if recipe.workers > max(64, 4 * cores):
        raise ValueError(f"workers ({recipe.workers}) are processes of every rank, and this machine has {cores} cores; {cores} are plenty")
    if recipe.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("quantization: nf4 needs bitsandbytes; pip install bitsandbytes, or drop `quantization`")
    if recipe.retain == "auto" and recipe.retain_mib is None and not on_gpu:
        raise ValueError("retain: auto measures free GPU memory, and there is no GPU here; give retain_mib, or a number of chunks")
    if recipe.autocast == "float16" and not on_gpu:
        raise ValueError("autocast: float16 needs a GPU, and there is none here; choose autocast: bfloat16, or leave it out")


# Memory


@dataclass(frozen=True)
class Needs:
    """Bytes of a rank that stay for the whole run, whatever the chunks: the least that a recipe takes."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def needs(recipe: Recipe, model: Description, ranks: int = 1) -> Needs:
    """Counted on the recipe's own modules, adapter and shards included, without reading or allocating a weight."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from .plan.fake.model import fake_model

    fake = fake_model(replace(recipe, model=model.weights), FakeTensorMode())
    shards = ranks if recipe.distributed == "fsdp" else 1
    # `train.parallel.sharding` leaves a frozen tower whole on every rank.
    tower = fake.backbone.vision_tower(fake.model).parameters() if vision_is_frozen(fake) else ()
    tower_ids = {id(parameter) for parameter in tower}
    weights = sum(_bytes(buffer) for buffer in fake.buffers())
    gradients = optimizer = 0
    for parameter in fake.parameters():
        size = _bytes(parameter) // (1 if id(parameter) in tower_ids else shards)
        weights += size
        if parameter.requires_grad:
            gradients += _bytes(parameter)  # shards of them are made in the last chunk's backward; until then they add up whole
            optimizer += state_bytes(recipe.optimizer, size // parameter.element_size(), parameter.element_size())
    return Needs(weights, gradients, optimizer)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def check_memory(recipe: Recipe, model: Description, memory: Memory | None, *, ranks: int, on_gpu: bool) -> None:
    """Raises ValueError where weights, gradients and optimizer state alone are more than the device has left.

    Args:
        memory: of the device; None where it is not known, and nothing is refused.
    """
    if memory is None:
        return
    try:
        need = needs(recipe, model, ranks)
    except ValueError:
        raise
    except Exception as error:  # of any family; a module that cannot be made without its weights may still train
        logger.info("memory is not checked: %s cannot be counted without its weights (%r)", recipe.model, error)
        return
    sharers = 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if need.total * sharers <= memory.free:
        return
    where = "the GPU" if on_gpu else "this machine"
    among = f" for each of {sharers} ranks" if sharers > 1 else ""
    raise ValueError(
        f"{recipe.model} does not fit: weights {_gib(need.weights)} ({recipe.quantization or recipe.dtype}), gradients "
        f"{_gib(need.gradients)} and {recipe.optimizer} {_gib(need.optimizer)} make {_gib(need.total)}{among} before any chunk, and "
        f"{where} has {_gib(memory.free)} free of {_gib(memory.total)}; {_mends(recipe, ranks)}; {COMMAND} plan shows what a recipe takes"
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"


def _mends(recipe: Recipe, ranks: int) -> str:
    """What would make the recipe smaller and is not done yet."""
    problems = []
    if recipe.lora is None:
        problems.append("train an adapter (--lora)")
    if recipe.quantization is None and recipe.distributed != "fsdp":
        problems.append("hold the base in four bits (--lora --quantization nf4, QLoRA)")
    if recipe.distributed != "fsdp" and recipe.quantization is None:
        problems.append("shard it over several GPUs (torchrun, --distributed fsdp)")
    elif recipe.distributed == "fsdp":
        problems.append(f"shard it over more than {ranks} GPU{'s' if ranks > 1 else ''} (torchrun --nproc-per-node)")
    if recipe.dtype in ("float32", "float64"):
        problems.append("use --dtype bfloat16")
    if not any(kind in recipe.optimizer for kind in ("8bit", "paged")) and recipe.distributed != "fsdp":
        problems.append("keep optimizer state in eight bits (--optimizer adamw_8bit)")
    return ", or ".join(problems) or "choose a smaller model"


# Rows


def check_rows(recipe: Recipe, processing: Any) -> None:
    """Measures rows of every source, spread over it, as every rank would see them.

    Raises:
        ValueError: a sample is longer than a chunk's budget; names its row and its tokens. Or no row of a source can be read.
            With `data.strict`, the first row that cannot be read.
    """
    dataset = PairDataset(recipe.data, processing, recipe.held_out_rows)
    most = _SAMPLED_ROWS if processing.from_headers else _SAMPLED_ROWS_DECODED
    longest: tuple[int, str] = (0, "")
    for source, size in enumerate(dataset.sizes):
        name = recipe.data.sources[source].name
        if size < 1:
            raise ValueError(f"source {name} has no rows; leave it out of the recipe")
        count = min(size, -(-most // len(dataset.sizes)))
        batch = collate([dataset[source, int(row)] for row in np.linspace(0, size - 1, count).astype(int)])
        if len(batch["errors"]) == count and count >= min(_ROWS_OF_A_SOURCE, size):
            raise ValueError(f"source {name}: {unreadable(count, str(count), batch['errors'][-1])}")
        lost = {row for (_, row), kept in zip(batch["rows"], batch["kept"]) if not kept}
        looked = [dataset.row(source, int(at)) for at in np.linspace(0, size - 1, min(size, _ROWS_LOOKED_UP)).astype(int)]
        recipe.objective.check_rows([(source, row) for row in looked if row not in lost])
        (_, row), tokens = longest_sample(batch)
        longest = max(longest, (tokens, f"{name}, row {row}"))
    tokens, row = longest
    if recipe.chunk_rows is None and tokens > recipe.chunk_tokens:
        raise ValueError(
            f"chunk_tokens ({recipe.chunk_tokens}) is below the longest sample: {row} has {tokens} tokens; "
            f"pass --chunk_tokens {tokens} or more, or make samples shorter by model_options (max_length, {processing.image_limit})"
        )
