"""The recipe's own step over fake tensors: `ContrastiveStep` as it is, with fake pixels and a GPU's attention."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from contrastive_kernels.gradcache.gradient_sync import GradientSync
from vlm2vec import attention
from vlm2vec.model import VLM2Vec
from vlm2vec.packing import PackedBatch

from ..data.media_stream import Media, Side
from ..recipe.schema import Recipe
from ..step import ContrastiveStep
from .fake_gradcache import PlannedGradCache
from .flops import attention_backward_flops, attention_flops
from .meter import Meter

FLASH = "planned"


class PlannedMedia(Media):
    """Gives fake pixels of the sizes that decoding would give."""

    def __init__(self, *args, mode: FakeTensorMode, **kwargs):
        super().__init__(*args, **kwargs)
        self.mode = mode
        self._pool.shutdown()
        self._pool = _AtOnce()

    def _decode(self, features):
        shape = self.processing.decoded_shape(features)
        with _disable_current_modes(), self.mode:  # host memory: no meter counts it
            tensors = {"pixel_values": torch.empty(shape, dtype=torch.uint8)}
        self.decoded += 1
        return tensors

    def release(self, tensors) -> None:
        pass

    def normalised(self, pixels: torch.Tensor, vision: dict) -> torch.Tensor:
        """Of a sample in host memory, in a chunk where others come as floats."""
        with _disable_current_modes(), self.mode:
            return torch.empty(self.processing.normalised_shape(pixels.shape, vision))


class _AtOnce:
    """An executor that runs what it is given there and then: fake tensors belong to one thread."""

    def submit(self, function: Callable, *args):
        return _Done(function(*args))

    def shutdown(self, **kwargs) -> None:
        pass


class _Done:
    def __init__(self, value):
        self._value = value

    def result(self):
        return self._value

    def exception(self):
        return None

    def cancel(self) -> bool:
        return False


class PlannedStep(ContrastiveStep):
    """`ContrastiveStep` whose chunks are fake. Runs inside `mode` and its meter.

    Args:
        flash: attention as the GPU's kernels do it, which never hold the scores; False: the CPU's own.
    """

    gradcache_class = PlannedGradCache

    def __init__(self, recipe: Recipe, model: VLM2Vec, mode: FakeTensorMode, meter: Meter, *, ranks: int, flash: bool):
        dtype = getattr(torch, recipe.autocast) if recipe.autocast else None

        def autocast():
            return torch.autocast("cpu", dtype) if dtype is not None else contextlib.nullcontext()

        super().__init__(recipe, model, model, device=torch.device("cpu"), autocast=autocast)
        self.media.close()
        self.media = PlannedMedia(model.processing, bound_mib=recipe.media_mib, threads=1, mode=mode)
        self.model = _like_accelerate(model, autocast, dtype is not None)
        self.mode, self.meter, self.flash = mode, meter, flash
        if model.always_vision:
            made = self._on_host()(model.placeholder)
            model.placeholder = lambda: _map(made(), self._fake)
        self.gradcache.meter = meter
        self.gradcache.prefetch = None
        _play_ranks(self.gradcache.sync, meter)
        self.gradcache.ranks = ranks
        if self.gradcache.freeze is not None:
            config = model.config
            deep = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
            self.gradcache.feature_width = model.embedding_dim * (1 + len(deep)) * model.dtype.itemsize
        if flash:
            attention._PROVIDER_FUNCTIONS[FLASH] = _Flash(meter)

    def __call__(self, batch: dict[str, Any]):
        names = ("query", "target", "negatives")
        self.gradcache.shapes = [[_shape(sample) for sample in batch[name]] for name in names]
        return super().__call__(batch)

    def _chunk(self, side: Side, rows: list[int], *, seen: bool = False) -> PackedBatch:
        model = self.unwrapped
        with self._on_host():
            features = [replace(f, vision={}, pending=[]) for f in side.measured(rows)] if seen else side.features(rows)
            features = [replace(f, vision=self._fake_pixels(f.vision)) for f in features]
            packed = model.backbone.pack(features, FLASH) if self.flash else model.pack(features)
        packed = _map(packed, self._fake)
        pixels = packed.vision.get("pixel_values") if packed.vision else None
        parts = pixels if isinstance(pixels, list) else [pixels]  # images and videos differ in the width of a patch
        if parts[0] is not None and parts[0].dtype != torch.uint8:
            for part in parts:
                self.meter.track(part)
        elif parts[0] is not None:
            if self.flash:
                parts = [torch.empty_like(part) for part in parts]  # copies on the device: what waits in host memory is no part of it
            for part in parts:
                self.meter.track(part)
            shapes = [model.processing.normalised_shape(part.shape, packed.vision) for part in parts]
            values = [torch.empty(shape).to(model.dtype) for shape in shapes]
            packed = replace(packed, vision={**packed.vision, "pixel_values": torch.cat(values) if len(values) > 1 else values[0]})
        return packed.to(self.device, model.dtype)

    def _on_host(self) -> contextlib.AbstractContextManager[None]:
        """What is made within it is real, and on a GPU none of the device's."""
        return _disable_current_modes() if self.flash else unset_fake_temporarily()

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        fake = self.mode.from_tensor(tensor, static_shapes=True)
        self.meter.track(fake)
        return fake

    def _fake_pixels(self, vision: dict) -> dict:
        """Pixels of samples that were processed whole, before they are joined: nothing is copied."""
        return {name: self._fake(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for name, v in vision.items()}

    def _masks(self, batch):
        return {}


def _play_ranks(sync: GradientSync, meter: Meter) -> None:
    """Ranks are alike, so that each agrees with itself; buckets of the synchronisation count as such."""
    finish = sync.finish

    def counted(others=()) -> None:
        with meter.counting_as("all-reduce buckets"):
            finish(others)

    sync.largest, sync.finish = lambda values: values, counted


def _shape(sample: dict) -> tuple[int, int, int]:
    """(tokens, image tokens, patches) of a sample."""
    visual = sample["visual_index"]
    return len(sample["input_ids"]), 0 if visual is None else len(visual), int(sample["vision_patches"])


def _map(value: Any, convert: Callable) -> Any:
    """The same nesting with each tensor converted; a tensor that stands in two places is converted once."""
    known: dict[int, Any] = {}

    def walk(v):
        if isinstance(v, torch.Tensor):
            if id(v) not in known:
                known[id(v)] = convert(v)
            return known[id(v)]
        if isinstance(v, dict):
            return {k: walk(e) for k, e in v.items()}
        if isinstance(v, (list, tuple)):
            return type(v)(walk(e) for e in v)
        if isinstance(v, (PackedBatch, attention.Segments, attention.Group)):
            return replace(v, **{f.name: walk(getattr(v, f.name)) for f in fields(v)})
        return v

    mapped = walk(value)
    known.clear()  # a function that names itself lives until the next collection, and would keep the tensors
    return mapped


def _like_accelerate(model: VLM2Vec, autocast: Callable, lowered: bool) -> Callable:
    """accelerate runs forward under autocast and hands its output back in float32."""

    def forward(*args, **kwargs):
        with autocast():
            out = model(*args, **kwargs)
        return out.float() if lowered else out

    return forward


class _Flash:
    """Packed attention that holds what flash attention holds: output and log-sum-exp, never the scores."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def __call__(self, q, k, v, segments, *, scale=None, dropout=0.0, window=None):
        return _FlashFunction.apply(q, k, v, Counter(segments.lengths), self.meter)


class _FlashFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths, meter):
        q, k, v = (x.contiguous() for x in (q, k, v))
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lengths, ctx.meter = lengths, meter
        meter.count_flops(sum(times * attention_flops(*_shapes(q, k, v, n)) for n, times in lengths.items()))
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _, _ = ctx.saved_tensors
        ctx.meter.count_flops(sum(times * attention_backward_flops(*_shapes(q, k, v, n)) for n, times in ctx.lengths.items()))
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


def _shapes(q, k, v, length: int) -> list[tuple[int, ...]]:
    return [(1, x.shape[1], length, x.shape[2]) for x in (q, k, v)]
