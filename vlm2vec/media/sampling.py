"""Which frames of a film are taken, and in which order frame files stand.

By number: the reference's rule, for encoding, training and evaluation: the integer part of linspace(0, n - 1, frames) over the
frames in natural order, and a film with fewer frames whole (MMEB-V2; VLM2Vec's training data are read by the same linspace).

By frames a second: the rule of Qwen's authors (qwen-vl-utils' `smart_nframes`, which Qwen3-VL-Embedding is fed by): seconds times
fps, at least 4 and at most `max_frames`, rounded down to an even number, at the rounded places of a linspace from first to last.
"""

import os
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

from vlm2vec.media.endings import PICTURES

FRAMES = 8  # of a film, in the reference's training and evaluation
LEAST_BY_FPS, MOST_BY_FPS = 4, 768  # of a film, where frames are taken by frames a second (qwen-vl-utils' defaults)

Frame = TypeVar("Frame")


def natural_order(name: str | os.PathLike) -> list[int | str]:
    """Sort key of a file's name that puts frame_2 before frame_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", os.path.basename(os.fspath(name)))]


def frame_indices(
    total: int,
    frames: int | None = FRAMES,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    rate: float | Fraction | None = None,
) -> list[int]:
    """Indices of the frames that are taken of `total`, from the first to the last.

    Args:
        frames: how many; all of them when there are fewer, or for None. Means nothing where `fps` is given.
        fps: frames a second instead; needs `rate`, the film's own frames a second.
        max_frames: at most so many, by either rule.
    """
    if fps is not None:
        if rate is None:
            raise ValueError("frames a second need the rate of the film; give the film itself, or a number of frames")
        most = min(MOST_BY_FPS if max_frames is None else max_frames, total)
        count = max(min(1, total), min(max(Fraction(total) / Fraction(rate) * Fraction(fps), LEAST_BY_FPS), most) // 2 * 2)
        return [(2 * i * (total - 1) + count - 1) // max(1, 2 * (count - 1)) for i in range(count)]
    limits = [limit for limit in (frames, max_frames) if limit is not None]
    if not limits or total <= (frames := min(limits)):
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
