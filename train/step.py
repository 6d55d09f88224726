"""One training step: a batch of undecoded samples in, gradients on the model out, through GradCache."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from contrastive_kernels import GradCache
from contrastive_kernels.gradcache import Observer
from vlm2vec.model import VLM2Vec

from .build import vision_is_frozen
from .data.groups import joined_ids
from .data.media_stream import BatchSide, Media
from .losses import LossBatch
from .parallel.offload import offloaded
from .recipe.schema import Recipe

logger = logging.getLogger(__name__)

_SIDES = ("query", "target", "negatives")


class ContrastiveStep:
    """Forward and backward of a rank's share of a global batch.

    Args:
        recipe: chunking, retention, loss.
        model: what is called, wrapped or not; gradients are synchronised over its ranks.
        unwrapped: the `VLM2Vec` inside.
        device: where chunks go.
        autocast: makes the context of what runs outside `model`'s own forward.
        scaler: a gradient scaler, or None.
        world_size: ranks over which the loss spans.
        loss: what the recipe's loss made (`train.losses`), with what it has learned so far; default a new one.
        media: decodes and packs chunks; default a `Media` by the recipe.
        attention: provider of packed attention (`vlm2vec.attention`), in place of the one that the model chooses.
        gradcache: makes the `GradCache`, from its arguments.
        observer: told the phases of every step (`contrastive_kernels.gradcache.observer`).

    Attributes:
        media: the decoder, with its figures.
        gradcache: with the chunk budget in force.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: torch.nn.Module,
        unwrapped: VLM2Vec,
        *,
        device: torch.device,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        scaler: torch.amp.GradScaler | None = None,
        world_size: int = 1,
        loss: Callable | None = None,
        media: Media | None = None,
        attention: str | Callable | None = None,
        gradcache: Callable[..., GradCache] = GradCache,
        observer: Observer | Sequence[Observer] | None = None,
    ):
        self.recipe, self.model, self.unwrapped = recipe, model, unwrapped
        self.device, self.autocast, self.world_size = device, autocast, world_size
        self.loss = recipe.objective.function() if loss is None else loss
        self.media = media or Media(
            unwrapped.processing, bound_mib=recipe.media_mib, threads=recipe.decode_threads, strict=recipe.data.strict
        )
        self.pack = unwrapped.pack if attention is None else functools.partial(unwrapped.backbone.pack, provider=attention)
        self.gradcache = gradcache(
            self._encode,
            self.loss,
            chunk_tokens=None if recipe.chunk_rows else recipe.chunk_tokens,
            chunk_size=recipe.chunk_rows,
            retain=recipe.retain,
            retain_mib=recipe.retain_mib,
            freeze=self._frozen_vision if vision_is_frozen(unwrapped) else None,
            keep_mib=recipe.keep_mib,
            prefetch=BatchSide.prefetch,
            release=BatchSide.release,
            module=model,
            scaler=scaler,
            observer=observer,
        )
        self._finite: list[tuple[BatchSide, list[int], torch.Tensor]] = []

    def __call__(self, batch: dict[str, Any]):
        """Runs the step; gradients are added to the model's.

        Args:
            batch: what `train.data.rows.collate` made. Rows whose images turn out unreadable are marked in it:
                `kept` (N,) bool becomes False and `errors` gains a line.

        Returns:
            (`InfoNCEResult`, tokens of each sample by side).
        """
        # A hard negative belongs to the row in whose stretch of the packed negatives it lies.
        owners = [range(len(batch["query"]))] * 2 + [np.repeat(np.arange(len(batch["query"])), np.diff(batch["hard_offsets"])).tolist()]
        report = self._reporter(batch)
        sides = [self.media.side(batch[name], owner, report) for name, owner in zip(_SIDES, owners, strict=True)]
        self._finite.clear()
        has_hard = len(sides[2]) > 0
        lengths = [side.lengths for side in sides if len(side)]
        try:
            result = self.gradcache.step(
                sides[0],
                sides[1],
                hard_negatives=sides[2] if has_hard else None,
                lengths=tuple(lengths),
                late_options=lambda: self._masks(batch),
                **self._loss_options(batch, has_hard),
            )
        finally:
            for side in sides:
                side.close()
        return result, lengths

    # What GradCache calls

    def _encode(self, side: BatchSide, rows: list[int], features=None) -> torch.Tensor:
        packed = self._chunk(side, rows, seen=features is not None)
        with offloaded(self.recipe.offload_activations and torch.is_grad_enabled()):
            hidden = self.model(packed) if features is None else self.model(packed, vision_features=features)
        self._finite.append((side, rows, torch.isfinite(hidden.detach()).all(dim=1)))
        unreadable = side.unreadable(rows)
        if torch.is_grad_enabled() and any(unreadable):
            # Grey pixels must not train: a row that could not be read in the second pass was a row of the loss all the same.
            hidden = torch.where(torch.tensor(unreadable, device=hidden.device)[:, None], hidden.detach(), hidden)
        return hidden

    def embed(self, side: BatchSide, rows: list[int]) -> torch.Tensor:
        """(len(rows), D) embeddings outside of a step, for which nothing is kept."""
        hidden = self.model(self._chunk(side, rows))
        side.release(rows)
        return hidden

    def _frozen_vision(self, side: BatchSide, rows: list[int]):
        # The library puts autocast around forward alone.
        with self.autocast():
            return self.unwrapped.vision(self._chunk(side, rows))

    def _chunk(self, side: BatchSide, rows: list[int], *, seen: bool = False):
        """Samples packed and on the device; `seen`: their vision features are there, so that pixels are not needed."""
        return self.media.packed(side, rows, self.pack, self.device, self.unwrapped.dtype, with_pixels=not seen)

    # The loss

    def _loss_options(self, batch: dict[str, Any], has_hard: bool) -> dict[str, Any]:
        return self.recipe.objective.options(self.loss_batch(batch, has_hard, dist.group.WORLD if self.world_size > 1 else None))

    def loss_batch(self, batch: dict[str, Any], has_hard: bool, group: dist.ProcessGroup | None = None, **changes: Any) -> LossBatch:
        """What the loss may know of a collated batch, on the device."""
        names = ["query_ids", "target_ids", "pairs", *(name for name in ("grades", "scores") if name in batch)]
        names += ["hard_offsets", "hard_ids"] if has_hard else []
        if any(source.group for source in self.recipe.data.sources):  # on every rank alike
            hard = batch["hard_ids"] if has_hard else None
            targets, hard = joined_ids(batch["target_ids"], batch["group_ids"], hard, group, self.device)
            batch = {**batch, "target_ids": targets, "hard_ids": hard}
        known = {name: self._tensor(batch[name]) for name in names if name in batch and name not in changes}
        sources = torch.tensor([source for source, _ in batch["rows"]], dtype=torch.int64).to(self.device)
        host = {"places": batch["rows"], "counted": batch["kept"].copy(), "planned": batch.get("planned", False)}
        return LossBatch(**known, **changes, **host, sources=sources, group=group)

    def _masks(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Rows that could not be read are neither queries nor candidates. Every rank passes masks as soon as one has to."""
        some = not bool(batch["kept"].all())
        if self.world_size > 1:
            flag = torch.tensor(int(some), device=self.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            some = bool(flag)
        if not some:
            return {}
        readable = self._tensor(batch["kept"])
        return {"query_mask": readable, "target_mask": readable}

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    # Rows that went wrong

    def _reporter(self, batch: dict[str, Any]) -> Callable[[int, str], None]:
        names = [source.name for source in self.recipe.data.sources]

        def report(row: int, message: str) -> None:
            source, number = batch["rows"][row]
            batch["kept"][row] = False
            batch["errors"].append(f"{names[source]}, row {number}: {message}")

        return report

    def not_finite(self, rows_of_batch: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """(source, row) of the samples whose embeddings in the last step were not finite."""
        found = set()
        for side, rows, finite in self._finite:
            found.update(side.owners[row] for row, good in zip(rows, finite.tolist(), strict=True) if not good)
        return sorted({tuple(rows_of_batch[row]) for row in found})
