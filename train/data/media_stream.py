"""Images of a step, decoded chunk by chunk under a bound on host memory.

A batch carries image files by name, with token counts taken from their headers. Threads decode the images of the coming
chunk to 8-bit pixels while the model runs on the one before; what was decoded is kept until it is released, as long as it
fits, and decoded again beyond that. Samples that were processed whole pass through unchanged.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from vlm2vec.packing import Features, PackedBatch

from .rows import to_features

logger = logging.getLogger(__name__)

Pack = Callable[[list[Features]], PackedBatch]

_MIB = 2**20
_GREY = 128


class Media:
    """Decodes for one trainer.

    Args:
        processing: the model's; gives `decode` and `normalised`.
        bound_mib: most MiB of decoded images kept for their next use. The chunk in use and the next one come on top.
        threads: how many images are decoded at a time.
        executor: what decodes, in place of `threads` threads.
        strict: an image that cannot be decoded raises; otherwise its row is reported and shown grey.

    Attributes:
        peak_bytes: most bytes of decoded images at one time so far: kept, and decoded ahead for the coming chunk.
        decoded: how many samples were decoded so far, second times included.
    """

    def __init__(
        self, processing: Any, *, bound_mib: float, threads: int = 1, strict: bool = False, executor: ThreadPoolExecutor | None = None
    ):
        self.processing = processing
        self.bound = bound_mib * _MIB
        self.strict = strict
        self.kept_bytes = 0
        self.peak_bytes = 0
        self.decoded = 0
        self._held = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if executor is None else executor

    def side(self, samples: list[dict[str, Any]], owners: Sequence[int], on_error: Callable[[int, str], None]) -> BatchSide:
        """One side of a batch. `on_error(owner, message)` hears of each sample that cannot be decoded, once.

        Args:
            owners: for each sample, the row of the batch that it belongs to.
        """
        return BatchSide(self, samples, owners, on_error)

    def submit(self, features: Features) -> Future:
        return self._pool.submit(self.decode, features)

    def decode(self, features: Features) -> dict[str, torch.Tensor]:
        """8-bit pixels of one sample's images; runs in a thread.

        Raises:
            ValueError: a damaged file, or an image processor that gives something else than 8-bit pixels.
        """
        tensors = self.processing.decode(features)
        kind = tensors["pixel_values"].dtype
        if kind != torch.uint8:  # floats would pass for values that are normalised already
            raise ValueError(
                f"expected 8-bit pixels from decoding, got {kind}; the image processor is of a release that this code does not know"
            )
        with self._lock:
            self.decoded += 1
            self._held += _bytes(tensors)
            self.peak_bytes = max(self.peak_bytes, self._held)
        return tensors

    def release(self, tensors: dict[str, torch.Tensor]) -> None:
        with self._lock:
            self._held -= _bytes(tensors)

    def normalised(self, pixels: torch.Tensor, vision: dict) -> torch.Tensor:
        """8-bit pixels of one or several samples as floats, where they lie."""
        return self.processing.normalised(pixels, vision)

    def packed(
        self, side: BatchSide, rows: list[int], pack: Pack, device: torch.device, dtype: torch.dtype, *, with_pixels: bool = True
    ) -> PackedBatch:
        """A chunk on the device: the samples of `rows`, packed by `pack`.

        Args:
            with_pixels: False where their vision features are at hand.
        """
        if with_pixels:
            features = side.features(rows)
        else:
            features = [replace(f, vision={}, pending=[]) for f in side.measured(rows)]
        return self.to_device(pack(features), device, dtype)

    def to_device(self, packed: PackedBatch, device: torch.device, dtype: torch.dtype) -> PackedBatch:
        """Moves a chunk; 8-bit pixels become what the vision tower takes once they are there."""
        packed = packed.to(device, dtype)
        pixels = packed.vision.get("pixel_values") if packed.vision else None
        # Images and videos differ in the width of a patch, so they stay a list until each is expanded.
        parts = pixels if isinstance(pixels, list) else [pixels]
        if parts[0] is None or parts[0].dtype != torch.uint8:
            return packed
        values = [self.normalised(part, packed.vision).to(dtype) for part in parts]
        return replace(packed, vision={**packed.vision, "pixel_values": torch.cat(values) if len(values) > 1 else values[0]})

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class BatchSide:
    """The samples of one side of a step; `features` gives those of a chunk, decoded."""

    def __init__(self, media: Media, samples: list[dict[str, Any]], owners: Sequence[int], on_error: Callable[[int, str], None]):
        self._media, self._samples, self._on_error = media, samples, on_error
        self.owners = owners
        self._coming: dict[int, Future] = {}
        self._kept: dict[int, dict[str, torch.Tensor]] = {}
        self._bad: set[int] = set()
        self._read: set[int] = set()
        self.lengths = [len(sample["input_ids"]) for sample in samples]

    def __len__(self) -> int:
        return len(self._samples)

    def prefetch(self, rows: list[int]) -> None:
        """Begins to decode rows that will be asked for next."""
        for row in rows:
            waiting = row in self._coming or row in self._kept or row in self._bad
            if self._samples[row]["pending"] and not waiting:
                self._coming[row] = self._media.submit(to_features(self._samples[row]))

    def features(self, rows: list[int]) -> list[Features]:
        """Samples ready to be packed. Their images are kept for the next use, where they fit, until they are released."""
        self.prefetch(rows)
        samples = [self._one(row) for row in rows]
        kinds = {f.vision["pixel_values"].dtype for f in samples if isinstance(f.vision.get("pixel_values"), torch.Tensor)}
        if len(kinds) > 1:  # some of the samples were processed whole; pixels of one chunk are joined
            samples = [self._normalised(f) for f in samples]
        return samples

    def release(self, rows: list[int]) -> None:
        """Forgets the images of rows that will not be asked for again in this step."""
        for row in rows:
            tensors = self._kept.pop(row, None)
            if tensors is not None:
                self._media.kept_bytes -= _bytes(tensors)
                self._media.release(tensors)

    def unreadable(self, rows: list[int]) -> list[bool]:
        """For each row whether its images were asked for and could not be decoded."""
        return [row in self._bad for row in rows]

    def measured(self, rows: list[int]) -> list[Features]:
        """Samples as they are in the batch, undecoded."""
        return [to_features(self._samples[row]) for row in rows]

    def _normalised(self, features: Features) -> Features:
        pixels = features.vision.get("pixel_values")
        if pixels is None or pixels.dtype != torch.uint8:
            return features
        return replace(features, vision={**features.vision, "pixel_values": self._media.normalised(pixels, features.vision)})

    def _one(self, row: int) -> Features:
        features = to_features(self._samples[row])
        if not features.pending:
            return features
        tensors = self._kept.get(row)
        if tensors is None:
            tensors = self._wait(row, features)
        if tensors is None:
            tensors = self._grey(features)
        elif row not in self._kept:
            size = _bytes(tensors)
            if self._media.kept_bytes + size <= self._media.bound:
                self._media.kept_bytes += size
                self._kept[row] = tensors
            else:
                self._media.release(tensors)
        return replace(features, pending=[], vision={**features.vision, **tensors})

    def _wait(self, row: int, features: Features) -> dict[str, torch.Tensor] | None:
        if row in self._bad:
            return None
        try:
            tensors = self._coming.pop(row).result()
        except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them stumble over
            message = str(error) if isinstance(error, ValueError) else f"{self._names(features)}: {type(error).__name__}: {error}"
            if row in self._read:
                message += "; it could be read before in this step, so its gradient is left out"
            if self._media.strict:
                raise ValueError(f"{message}; mend or remove the row, or set data.strict to false to leave it out") from error
            self._bad.add(row)
            self._on_error(self.owners[row], message)
            return None
        self._read.add(row)
        return tensors

    @staticmethod
    def _names(features: Features) -> str:
        names = [str(source) for sources in features.pending for source in sources if not isinstance(source, bytes)]
        return f"image {', '.join(names)}" if names else "image"

    def _grey(self, features: Features) -> dict[str, torch.Tensor]:
        """Stands in for pixels that cannot be had; the row is left out of the loss."""
        return {"pixel_values": torch.full(self._media.processing.decoded_shape(features), _GREY, dtype=torch.uint8)}

    def close(self) -> None:
        """Forgets what the step left: rows whose second use never came."""
        for future in self._coming.values():
            if not future.cancel() and future.exception() is None:
                self._media.release(future.result())
        self._coming.clear()
        self.release([*self._kept])


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
