"""Sizes and resizes of Qwen's own tools and processors, to the bit.

A picture is resized by PIL (bicubic) to multiples of a merged patch. A film's frames are resized by torchvision, in float32 with
antialias, and rounded; frames that were given one by one are resized by PIL before, to multiples of twice that (the tools pass their
factor on twice). Where a processor resizes again, it is torchvision: bytes stay bytes, a film's floats stay floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlm2vec.backbones.pixels import smart_resize
from vlm2vec.media.images import Undecoded

if TYPE_CHECKING:
    import numpy as np


LEAST_TOKENS, MOST_TOKENS = 4, 16384  # of a picture, unless limits say other ones
TOGETHER = 16  # frames that are floats at a time


def bounded(width: int, height: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """(width, height), multiples of `factor`, of an area within the limits. ValueError for limits that cross, and strips."""
    if min_pixels > max_pixels:
        raise ValueError(f"min_pixels={min_pixels} is above max_pixels={max_pixels}; no image could keep to both")
    h, w = smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels, reference_edges=False)
    return w, h


def picture_size(size: tuple[int, int], factor: int, limits: dict[str, float]) -> tuple[int, int]:
    """(width, height) of a picture after the tools' resize; `limits` may hold min_pixels and max_pixels."""
    least, most = (limits.get(name, tokens * factor**2) for name, tokens in (("min_pixels", LEAST_TOKENS), ("max_pixels", MOST_TOKENS)))
    return bounded(*size, factor, least, most)


def frame_size(
    size: tuple[int, int], count: int, factor: int, *, min_pixels: float, most: float, total_pixels: float, max_pixels: float | None
) -> tuple[int, int]:
    """(width, height) of each of a film's frames after the tools' resize.

    Args:
        min_pixels: of a frame. most: of a frame, by itself. total_pixels: of which two frames share a film's. max_pixels: the
            caller's own bound of a frame, which may only lower the others.
    """
    bound = max(min(most, total_pixels / count * 2), int(min_pixels * 1.05))
    return bounded(*size, factor, min_pixels, bound if max_pixels is None else min(max_pixels, bound))


def film_again(size: tuple[int, int], count: int, factor: int, limits: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of frames after the processor's resize, whose (least, most) pixels are those of all frames together."""
    width, height = size
    area, (least, most) = count * width * height, limits
    if area > most:
        beta = math.sqrt(area / most)
        return tuple(max(factor, math.floor(side / beta / factor) * factor) for side in size)
    if area < least:
        beta = math.sqrt(least / area)
        return tuple(math.ceil(side * beta / factor) * factor for side in size)
    return size


def by_pil(image: Any, size: tuple[int, int]) -> Any:
    """A picture of (width, height); one of which only the header is known stays so."""
    if isinstance(image, Undecoded):
        return Undecoded(image.source, size)
    from PIL.Image import Resampling

    return image.resize(size, Resampling.BICUBIC)


def as_bytes(image: Any) -> np.ndarray:
    """(H, W, 3) uint8 of an RGB picture."""
    import numpy as np

    return np.asarray(image)


def picture_by_torchvision(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 resized as transformers' torchvision processors resize a picture, to (width, height)."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tvf

    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()[None]
    image = tvf.resize(image, [size[1], size[0]], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return image[0].permute(1, 2, 0).numpy()


def film_by_torchvision(frames: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """(F, H, W, 3) uint8: frames resized in float32, clamped and rounded, to (width, height); a few at a time."""
    import numpy as np
    from torchvision.transforms import InterpolationMode, functional

    out = np.empty((len(frames), size[1], size[0], 3), dtype=np.uint8)
    for at in range(0, len(frames), TOGETHER):
        some = torch.from_numpy(np.stack(frames[at : at + TOGETHER])).permute(0, 3, 1, 2)
        some = functional.resize(some, [size[1], size[0]], interpolation=InterpolationMode.BICUBIC, antialias=True)
        out[at : at + TOGETHER] = some.permute(0, 2, 3, 1).numpy()
    return out


def floats_by_torchvision(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(F, H, W, 3) float32 of (F, H, W, 3) uint8: a processor's resize of a film, which is not rounded."""
    import numpy as np
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tvf

    out = np.empty((len(frames), size[1], size[0], 3), dtype=np.float32)
    for at in range(0, len(frames), TOGETHER):
        some = torch.from_numpy(frames[at : at + TOGETHER]).permute(0, 3, 1, 2).float()
        some = tvf.resize(some, [size[1], size[0]], interpolation=InterpolationMode.BICUBIC, antialias=True)
        out[at : at + TOGETHER] = some.permute(0, 2, 3, 1).numpy()
    return out
