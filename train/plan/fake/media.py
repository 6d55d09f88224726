"""Media of a plan: chunks with fake pixels of the sizes that decoding would give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from vlm2vec import attention
from vlm2vec.backbones.base import Processing
from vlm2vec.packing import Features, PackedBatch

from ...data.media_stream import BatchSide, Media, Pack
from ..meter import Meter


class PlannedMedia(Media):
    """Gives chunks whose tensors are fake.

    Args:
        mode: under which they are made. meter: which counts those that lie on the device.
        on_gpu: host memory is not the device's, so that what waits there is not counted.
    """

    def __init__(self, processing: Processing, *, bound_mib: float, mode: FakeTensorMode, meter: Meter, on_gpu: bool):
        super().__init__(processing, bound_mib=bound_mib, executor=_AtOnce())
        self.mode, self.meter, self.on_gpu = mode, meter, on_gpu

    def decode(self, features: Features) -> dict[str, torch.Tensor]:
        shape = self.processing.decoded_shape(features)
        with _disable_current_modes(), self.mode:  # host memory: no meter counts it
            tensors = {"pixel_values": torch.empty(shape, dtype=torch.uint8)}
        self.decoded += 1
        return tensors

    def release(self, tensors: dict[str, torch.Tensor]) -> None:
        pass

    def normalised(self, pixels: torch.Tensor, vision: dict) -> torch.Tensor:
        """Of a sample in host memory, in a chunk where others come as floats."""
        with _disable_current_modes(), self.mode:
            return torch.empty(self.processing.normalised_shape(pixels.shape, vision))

    def packed(
        self, side: BatchSide, rows: list[int], pack: Pack, device: torch.device, dtype: torch.dtype, *, with_pixels: bool = True
    ) -> PackedBatch:
        with self.on_host():
            features = side.features(rows) if with_pixels else [replace(f, vision={}, pending=[]) for f in side.measured(rows)]
            features = [replace(f, vision=self._fake_pixels(f.vision)) for f in features]
            packed = pack(features)
        packed = map_tensors(packed, self.fake)
        pixels = packed.vision.get("pixel_values") if packed.vision else None
        parts = pixels if isinstance(pixels, list) else [pixels]  # images and videos differ in the width of a patch
        if parts[0] is not None and parts[0].dtype != torch.uint8:
            for part in parts:
                self.meter.track(part)
        elif parts[0] is not None:
            if self.on_gpu:
                parts = [torch.empty_like(part) for part in parts]  # copies on the device: what waits in host memory is no part of it
            for part in parts:
                self.meter.track(part)
            shapes = [self.processing.normalised_shape(part.shape, packed.vision) for part in parts]
            values = [torch.empty(shape).to(dtype) for shape in shapes]
            packed = replace(packed, vision={**packed.vision, "pixel_values": torch.cat(values) if len(values) > 1 else values[0]})
        return packed.to(device, dtype)

    def on_host(self) -> contextlib.AbstractContextManager[None]:
        """What is made within it is real, and on a GPU none of the device's."""
        return _disable_current_modes() if self.on_gpu else unset_fake_temporarily()

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor like a real one, counted."""
        if isinstance(tensor, FakeTensor):
            return tensor
        fake = self.mode.from_tensor(tensor, static_shapes=True)
        self.meter.track(fake)
        return fake

    def _fake_pixels(self, vision: dict) -> dict:
        """Pixels of samples that were processed whole, before they are joined: nothing is copied."""
        return {name: self.fake(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for name, v in vision.items()}


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


def map_tensors(value: Any, convert: Callable) -> Any:
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
