"""Which frames of a film are taken, and in which order frame files stand.

The reference's rule, for encoding, training and evaluation: the integer part of linspace(0, n - 1, frames) over the frames in
natural order, and a film with fewer frames whole (MMEB-V2; VLM2Vec's training data are read by the same linspace).
"""

import os
import re
from collections.abc import Sequence
from typing import TypeVar

from vlm2vec.media.endings import PICTURES

FRAMES = 8  # of a film, in the reference's training and evaluation

Frame = TypeVar("Frame")


def natural_order(name: str | os.PathLike) -> list[int | str]:
    """Sort key of a file's name that puts frame_2 before frame_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", os.path.basename(os.fspath(name)))]


def frame_indices(total: int, frames: int | None = FRAMES) -> list[int]:
    """Indices of `frames` of `total` frames, from the first to the last; all of them when there are fewer, or for None."""
    if frames is None or total <= frames:
        return list(range(total))
    if frames == 1:
        return [0]
    step, last = (total - 1) / (frames - 1), total - 1
    # linspace sets its end exactly; i * step may fall short of it by a rounding
    return [last if i == frames - 1 else int(i * step) for i in range(frames)]


def sample(film: Sequence[Frame], frames: int | None = FRAMES) -> list[Frame]:
    """The frames at `frame_indices` of a sequence of frames, or of their files."""
    return [film[i] for i in frame_indices(len(film), frames)]


def frame_files(folder: str | os.PathLike) -> list[str]:
    """Paths of the frame files in a folder, in natural order; [] when there is no such folder."""
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        return []
    names = sorted(sorted(os.listdir(folder)), key=natural_order)  # frame_1 and frame_01 are equal to natural_order
    return [os.path.join(folder, name) for name in names if name.lower().endswith(PICTURES)]
