"""The recipe's own step over fake tensors: `ContrastiveStep` as it is, handed fake media, a GPU's attention and an account."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from contrastive_kernels import GradCache, InfoNCELoss, info_nce
from vlm2vec.model import VLM2Vec

from ...build import vision_is_frozen
from ...recipe.schema import Recipe
from ...step import ContrastiveStep
from ..meter import Meter
from .attention import FlashAttention
from .gradcache import LossOfRanks, PlannedSync, Settings, StepAccount, loss_of_ranks
from .media import PlannedMedia, map_tensors


class PlannedStep:
    """One step of a recipe whose chunks are fake. Runs inside `mode` and its meter.

    Args:
        trained: the trained weights; stand-ins of repeated layers have none.
        ranks: of the run. is_sharded: whether FSDP2 holds the weights.
        flash: attention as the GPU's kernels do it, which never hold the scores; False: the CPU's own.
        most_chunks: chunks that are all run; of more than that, some stand for their neighbours. is_sample: as `Settings` has it.
        after_chunk: called when a chunk's gradients are there.

    Attributes:
        account: what the step took.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: VLM2Vec,
        mode: FakeTensorMode,
        meter: Meter,
        *,
        trained: list[torch.nn.Parameter],
        ranks: int,
        is_sharded: bool,
        flash: bool,
        most_chunks: int,
        is_sample: bool,
        after_chunk: Callable[[], None],
    ):
        dtype = getattr(torch, recipe.autocast) if recipe.autocast else None

        def autocast():
            return torch.autocast("cpu", dtype) if dtype is not None else contextlib.nullcontext()

        media = PlannedMedia(model.processing, bound_mib=recipe.media_mib, mode=mode, meter=meter, on_gpu=flash)
        if model.always_vision:
            make_placeholder = media.on_host()(model.placeholder)
            model.placeholder = lambda: map_tensors(make_placeholder(), media.fake)
        width = _feature_width(model) if vision_is_frozen(model) else 0
        settings = Settings(recipe.retain, recipe.keep_mib, width, ranks, is_sharded, most_chunks, is_sample)
        self.account = StepAccount(meter, settings, after_chunk)
        sync = PlannedSync(model, trained, torch.distributed.group.WORLD if ranks > 1 and not is_sharded else None)

        def gradcache(encode: Callable, loss: Any = None, **options: Any) -> GradCache:
            if ranks > 1:
                alone = loss is info_nce or isinstance(loss, InfoNCELoss)
                loss = LossOfRanks(ranks) if alone else loss_of_ranks(loss, ranks)
            changes = {"module": sync, "prefetch": None, "select": self.account.select, "observer": self.account.observe}
            return GradCache(encode, loss, **options | changes)

        self._step = ContrastiveStep(
            recipe,
            _like_accelerate(model, autocast, dtype is not None),
            model,
            device=torch.device("cpu"),
            autocast=autocast,
            media=media,
            attention=FlashAttention(meter) if flash else None,
            gradcache=gradcache,
        )

    def __call__(self, batch: dict[str, Any]) -> None:
        """Runs the step over a batch of `train.data.rows.collate`, as if every row of it could be read."""
        self.account.shapes = [[_shape(sample) for sample in batch[name]] for name in ("query", "target", "negatives")]
        self._step({**batch, "kept": np.ones_like(batch["kept"]), "planned": True})


def _feature_width(model: VLM2Vec) -> int:
    """Bytes of a frozen tower's output per image token."""
    return model.backbone.vision_width(model.config) * model.dtype.itemsize


def _shape(sample: dict) -> tuple[int, int, int]:
    """(tokens, image tokens, patches) of a sample."""
    visual = sample["visual_index"]
    return len(sample["input_ids"]), 0 if visual is None else len(visual), int(sample["vision_patches"])


def _like_accelerate(model: VLM2Vec, autocast: Callable, lowered: bool) -> Callable:
    """accelerate runs forward under autocast and hands its output back in float32."""

    def forward(*args, **kwargs):
        with autocast():
            out = model(*args, **kwargs)
        return out.float() if lowered else out

    return forward
