"""HD transform of Phi-3.5-V: one picture -> a global view and h x w crops, all of `crop` x `crop` pixels.

Rules (processing code of microsoft/Phi-3.5-vision-instruct; numbers checked by tests/vlm2vec/backbones/test_phi3_v_images.py):
portrait pictures are transposed first; the longer side becomes k crops, with the largest k for which
k * ceil(k / ratio) <= num_crops; the shorter side follows the ratio (rounded down) and is padded with white above and
below to a multiple of the crop; transposed back; scaled to [0, 1] and normalised. The global view is a bicubic resize of
the normalised, padded picture. Crops are kept as they are: the reference's zero crops up to num_crops never reach the
language model, so they are neither stored nor encoded here.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

from vlm2vec.backbones.pixels import look_up

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def scaled_size(width: int, height: int, num_crops: int, crop: int = 336) -> tuple[int, int]:
    """Size in pixels of a landscape picture after scaling and before padding.

    Args:
        width, height: pixels, width >= height >= 1.
        num_crops: most crops the picture may take, >= 1.
    """
    ratio = width / height
    across = 1
    while across * math.ceil(across / ratio) <= num_crops:
        across += 1
    across -= 1
    scaled = across * crop
    # A line drawing 1 pixel high would be scaled to nothing; the reference's resize raises there.
    return scaled, max(1, int(scaled / ratio))


def padded_size(width: int, height: int, num_crops: int, crop: int = 336) -> tuple[int, int]:
    """(width, height) in pixels of the padded picture, both multiples of `crop`.

    Raises:
        ValueError: a size below one pixel, or `num_crops` below 1.
    """
    if width < 1 or height < 1:
        raise ValueError(f"phi3_v: an image of {width} x {height} pixels, expected at least 1 x 1")
    if not isinstance(num_crops, int) or num_crops < 1:
        raise ValueError(f"phi3_v: num_crops is {num_crops!r}, expected an integer of at least 1 (4 and 16 are usual)")
    long, short = scaled_size(max(width, height), min(width, height), num_crops, crop)
    short = math.ceil(short / crop) * crop
    return (short, long) if width < height else (long, short)


def image_tokens(width: int, height: int, crop: int = 336, grid: int = 12) -> int:
    """Tokens in the language model of a padded picture: every crop row ends in a separator, one more stands between
    the crops and the global view, which has its own row ends. With the published 336 and 12:
    (h*w + 1) * 144 + 1 + (h + 1) * 12 for h x w crops.
    """
    down, across = height // crop, width // crop
    return (down * across + 1) * grid * grid + 1 + (down + 1) * grid


def hd_transform(image: Image.Image, num_crops: int, crop: int = 336) -> Image.Image:
    """Scale and pad an RGB picture as the reference does; returns a picture of `padded_size`."""
    width, height = padded_size(*image.size, num_crops, crop)
    portrait = image.width < image.height
    if portrait:
        image, width, height = image.transpose(Image.Transpose.TRANSPOSE), height, width
    image = image.resize(scaled_size(*image.size, num_crops, crop), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (width, height), (255, 255, 255))
    canvas.paste(image, (0, (height - image.height) // 2))
    return canvas.transpose(Image.Transpose.TRANSPOSE) if portrait else canvas


def image_tiles(image: Image.Image, num_crops: int, crop: int = 336) -> torch.Tensor:
    """(h*w, 3, crop, crop) uint8: the scaled and padded picture, row by row. All that its views are made of."""
    pixels = torch.from_numpy(np.array(hd_transform(image, num_crops, crop)))
    height, width, _ = pixels.shape
    tiles = pixels.view(height // crop, crop, width // crop, crop, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, crop, crop)


def normalised_views(
    tiles: torch.Tensor, grids: list[tuple[int, int]], mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> torch.Tensor:
    """What the vision tower sees of some pictures, made on the device that the tiles are on.

    Args:
        tiles: uint8 as `image_tiles` gives them, one picture behind the other.
        grids: (h, w) in tiles of each picture.
        mean, std: per channel, in [0, 1] units.

    Returns:
        (sum of 1 + h*w, 3, crop, crop) float32: of each picture its global view and then its tiles.

    Numerics: on a CPU the reference's values to the bit. Elsewhere the tiles are, and the global view to float32 rounding.
    """
    crop = tiles.shape[-1]
    table = torch.arange(256).to(torch.float32).div(255)[:, None].sub(torch.tensor(mean)).div(torch.tensor(std)).to(tiles.device)
    views = torch.empty(len(tiles) + len(grids), 3, crop, crop, dtype=torch.float32, device=tiles.device)
    at, first = 0, 0
    for down, across in grids:
        count = down * across
        parts = look_up(tiles[first : first + count], table, views[at + 1 : at + 1 + count])
        picture = parts.view(down, across, 3, crop, crop).permute(2, 0, 3, 1, 4).reshape(1, 3, down * crop, across * crop)
        views[at] = torch.nn.functional.interpolate(picture, size=(crop, crop), mode="bicubic", align_corners=False)[0]
        at, first = at + 1 + count, first + count
    return views
