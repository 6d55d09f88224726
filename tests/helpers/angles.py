"""A model whose vectors are angles that inputs show, so that every ranking can be told by hand: the nearest angle is first.

A text shows `angle:30`, a picture its red channel, a sound its constant level (angle / 200), an input without any of them 170 degrees.
"""

import math
import re
import wave
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlm2vec.media.images import open_picture
from vlm2vec.media.sounds import RATE, read_sound

NOTHING = 170.0


class AngleModel:
    """`modalities` as VLM2Vec has them; `encoded` is what was fed, in its order."""

    def __init__(self, modalities=("text", "image", "video", "audio"), limit=None):
        self.modalities, self.limit, self.encoded = modalities, limit, []

    def identity(self):
        return {"angles": 1}

    def preprocess(self, inputs):
        for item in inputs:
            self.angle(item)

    def angle(self, item):
        told = re.search(r"angle:(\d+(?:\.\d+)?)", item.get("text") or "")
        if told:
            return float(told[1])
        for name in ("image", "video"):
            visual = item.get(name)
            if visual:
                first = visual[0] if isinstance(visual, (list, tuple)) else visual
                return float(open_picture(first, orientation="stored", background="hidden").getpixel((0, 0))[0])
        if item.get("audio") is not None:
            return float(read_sound(item["audio"]).mean() * 200)
        return NOTHING

    def encode(self, inputs, *, batch_size=32, convert_to_tensor=True, show_progress_bar=None, prompt=None):
        self.encoded += inputs
        turns = [math.radians(self.angle(item)) for item in inputs]
        return torch.tensor([[math.cos(turn), math.sin(turn)] for turn in turns])


def picture(path: Path, angle: int) -> Path:
    """A picture of one colour, stored without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (angle, 50, 50)).save(path, format="PNG")
    return path


def film(folder: Path, angle: int, frames: int = 2) -> None:
    for number in range(frames):
        picture(folder / f"frame_{number + 1}.png", angle)


def sound(path: Path, *levels: float, seconds: float = 1.0) -> Path:
    """A WAV of 16 kHz: each level (an angle) for so many seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.concatenate([np.full(round(seconds * RATE), level / 200) for level in levels])
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32767).round().astype("<i2").tobytes())
    return path
