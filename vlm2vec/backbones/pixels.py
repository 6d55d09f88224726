"""From an opened picture to what a vision tower takes: sizes, normalised values, patches. Shared by the families."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np


RESOLUTIONS = {"high": (1344, 1344), "mid": (672, 672), "low": (128, 128)}  # the reference's names of plain resizes


def plain_size(resolution: str | Sequence[int] | None, others: tuple[str, ...] = ()) -> tuple[int, int] | None:
    """(width, height) of a plain resize: one of `RESOLUTIONS`, or a pair of numbers; None for None and for names in `others`.

    Raises:
        ValueError: another name, or no pair of positive integers.
    """
    if resolution is None or (isinstance(resolution, str) and resolution in others):
        return None
    if isinstance(resolution, str) and resolution in RESOLUTIONS:
        return RESOLUTIONS[resolution]
    if isinstance(resolution, (list, tuple)) and len(resolution) == 2 and all(isinstance(n, int) and n > 0 for n in resolution):
        return tuple(resolution)
    raise ValueError(f"resolution={resolution!r}: expected {', '.join(map(repr, (*RESOLUTIONS, *others)))}, None or (width, height)")


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int, reference_edges: bool = True
) -> tuple[int, int]:
    """Qwen's target size as the V2 reference computes it: multiples of `factor`, area within the limits.

    A side below `factor` or an aspect ratio above 200 makes a square of the longer side. Where the reference would give a side
    of 0 (a strip under a small `max_pixels`) and fail, this gives `factor`. With reference_edges=False (families that the
    reference did not train) no squares are made, and an aspect ratio above 200 is an error.

    Returns:
        (height, width)
    """
    long = max(height, width) > 200 * min(height, width)
    if long and not reference_edges:
        raise ValueError(f"image of {width} x {height} pixels: the model takes aspect ratios up to 200; crop it")
    if reference_edges and (long or min(height, width) < factor):
        height = width = max(height, width)
    new_h, new_w = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if new_h * new_w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        new_h = max(factor, math.floor(height / beta / factor) * factor)
        new_w = max(factor, math.floor(width / beta / factor) * factor)
    elif new_h * new_w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_h, new_w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return new_h, new_w


@lru_cache(maxsize=16)
def pixel_table(scale: float, mean: tuple, std: tuple) -> np.ndarray:
    """(256, 3) float32: the normalised value of each 8-bit value, by the reference's own arithmetic (float64 product, then
    float32 minus mean over std), so that looking pixels up is exact and skips three passes over the image."""
    import numpy as np

    value = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)[:, None]
    return (value - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)


def look_up(pixels: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Normalised values of 8-bit pixels, on the device they are on: out[:, c] = table[pixels[:, c], c], broadcast.

    Args:
        pixels: (N, 3, ...) uint8 tensor.
        table: (256, 3) float32 tensor, values as `pixel_table` makes them; on the pixels' device, or it is moved there.
        out: (N, 3, ...) float32 tensor, written to and returned.
    """
    import numpy as np

    table = table.to(pixels.device)
    for c in range(3):
        if pixels.device.type == "cpu":  # numpy takes bytes as indices, torch would make them eight times as large
            out.numpy()[:, c] = np.take(table[:, c].numpy(), pixels[:, c].numpy())
        else:
            out[:, c] = table[:, c][pixels[:, c].int()]
    return out


def patchify(frames: np.ndarray, *, patch: int, merge: int, temporal: int) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut frames into Qwen's flat patches.

    Args:
        frames: (F, H, W, C) array, H and W multiples of patch * merge. The last frame is repeated to a multiple of `temporal`.

    Returns:
        ((t * h * w, C * temporal * patch * patch) array, (t, h, w)), merge blocks contiguous, axes within a patch (C, time, y, x).
    """
    import numpy as np

    if short := -len(frames) % temporal:
        frames = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)])
    f, height, width, c = frames.shape
    t, h, w = f // temporal, height // patch, width // patch
    cut = frames.reshape(t, temporal, h // merge, merge, patch, w // merge, merge, patch, c)
    cut = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return np.ascontiguousarray(cut).reshape(t * h * w, c * temporal * patch * patch), (t, h, w)
