"""Frames of a film and their times, by the rules of Qwen's own tools (qwen-vl-utils 0.0.14), which the published embedders are fed by.

A film file gives `fps` frames a second, at least 4 and an even number, at the rounded places of a float32 linspace; a frame's time is
its index over the film's average rate. A list of frames is used as it is; its times are i over `sample_fps`, and an odd one is given
twice and counted, so that one frame has the times 0 and 1 / sample_fps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch

from vlm2vec.media.endings import PICTURES
from vlm2vec.media.films import Frames, decode
from vlm2vec.media.sampling import LEAST_BY_FPS, MOST_BY_FPS, frame_files, frame_indices
from vlm2vec.media.sources import is_source_dict

STEP = 2  # frames to a time step: counts are multiples of it
SAMPLE_FPS = 2.0  # frames a second of a list that does not say it


class Film(Frames):
    """Frames of one film, an even number, with their times.

    Attributes:
        listed: the frames were given one by one, and are resized once more than those of a file.
    """

    def __init__(self, frames: Iterable[Any] = (), seconds: Sequence[float] | None = None, *, listed: bool = True):
        super().__init__(frames, seconds)
        self.listed = listed


def read_film(video: Any, *, fps: float | None, frames: int, max_frames: int | None, most_listed: int | None, settings: dict) -> Film:
    """The frames of a film file, a folder of frames or a list of frames, not opened yet where they are files.

    Args:
        fps, max_frames: of a film file, unless `settings` says other ones; without fps, `frames` of them.
        most_listed: of a folder or list, at the integer parts of a linspace; None takes all.
        settings: what the caller says of this film alone (`vlm2vec.inputs.SETTINGS`).

    Raises:
        ValueError: names what is missing, cannot be decoded, has no frames or fewer than two.
    """
    if is_source_dict(video) and video.get("path") is not None:
        video = video["path"]
    if isinstance(video, (list, tuple)):
        return listed(video, most_listed, settings)
    if not isinstance(video, (str, os.PathLike)):
        raise ValueError(f"expected a video file, a folder of frames or a list of frames, got {type(video).__name__}")
    path = os.fspath(video)
    if os.path.isdir(path):
        stored = frame_files(path)
        if not stored:
            raise ValueError(f"video folder {path}: no frame images ({', '.join(PICTURES)})")
        return listed(stored, most_listed, settings)
    if not os.path.isfile(path):
        raise ValueError(f"video {path}: no such file or folder of frames")
    if "fps" in settings and "nframes" in settings:
        raise ValueError(f"video {path}: expected fps or nframes of one film, got both; leave one out")
    return from_file(path, {"fps": fps, "frames": frames, "max_frames": max_frames, **settings})


def listed(video: Sequence[Any], most: int | None, settings: dict) -> Film:
    """A film of frames that were given one by one; times that they have (`Frames.seconds`) are kept."""
    if not video:
        raise ValueError("a video needs at least one frame, got an empty list")
    kept = frame_indices(len(video), None, max_frames=most)
    taken, known = [video[i] for i in kept], getattr(video, "seconds", None)
    taken += taken[-1:] * (-len(taken) % STEP)
    rate = settings.get("sample_fps", SAMPLE_FPS)
    times = [i / rate for i in range(len(taken))] if known is None else [known[i] for i in kept]
    return Film(taken, times + times[-1:] * (len(taken) - len(times)))


def from_file(path: str, asked: dict[str, Any]) -> Film:
    """Frames of a film file that `asked` chooses by nframes, fps, min_frames and max_frames, or frames, as players show them."""
    seen: dict[str, Any] = {}

    def choose(total: int, rate: Fraction | None) -> list[int]:
        if not rate:
            raise ValueError(f"video {path}: expected a film with a rate, got none; give its frames as a list")
        if total < STEP:
            raise ValueError(f"video {path}: expected at least {STEP} frames, got {total}; give it as an image, or its frame as a list")
        seen["rate"], seen["indices"] = float(rate), evenly(total, frame_count(total, float(rate), asked, path))
        return seen["indices"]

    taken = decode(path, choose)
    return Film(taken, [index / seen["rate"] for index in seen["indices"]], listed=False)


def frame_count(total: int, rate: float, asked: dict[str, Any], name: str = "") -> int:
    """How many frames are taken of a film of `total` frames, `rate` a second."""
    if asked.get("nframes") is not None:
        count = round(asked["nframes"] / STEP) * STEP
    elif asked.get("fps") is None:
        count = max(STEP, min(asked["frames"], total) // STEP * STEP)
    else:
        least = math.ceil(asked.get("min_frames", LEAST_BY_FPS) / STEP) * STEP
        most = MOST_BY_FPS if asked.get("max_frames") is None else asked["max_frames"]
        most = (min(most, total) if asked.get("max_frames") is None else most) // STEP * STEP
        count = math.floor(min(min(max(total / rate * asked["fps"], least), most), total) / STEP) * STEP
    if not STEP <= count <= total:
        raise ValueError(f"video {name}: expected {STEP} to {total} frames, got {count}; ask for other nframes, fps or max_frames")
    return int(count)


def evenly(total: int, count: int) -> list[int]:
    """Indices from the first to the last of `total`, rounded from a float32 linspace, ties to even."""
    return torch.linspace(0, total - 1, count, dtype=torch.float32).round().long().tolist()


def stamps(film: Film) -> list[str]:
    """What stands before each time step: the mean of its frames' times, to a tenth of a second."""
    return [f"<{(first + last) / 2:.1f} seconds>" for first, last in zip(film.seconds[::STEP], film.seconds[STEP - 1 :: STEP])]


def opened(film: Film, open_one: Callable[[Any], Any]) -> Film:
    """The film with its frames opened, each file once."""
    last: list[Any] = []
    for at, frame in enumerate(film):
        last.append(last[-1] if at and frame is film[at - 1] else open_one(frame))
    return Film(last, film.seconds, listed=film.listed)
