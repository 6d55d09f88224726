"""Which frames of a film are taken, and in which order frame files stand.

By number: the reference's rule, for encoding, training and evaluation: the integer part of linspace(0, n - 1, frames) over the
frames in natural order, and a film with fewer frames whole (MMEB-V2; VLM2Vec's training data are read by the same linspace).

By frames a second: the rule of Qwen's authors (qwen-vl-utils' `smart_nframes`, which Qwen3-VL-Embedding is fed by): seconds times
fps, at least 4 and at most `max_frames`, rounded down to an even number, at the rounded places of a linspace from first to last.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

from vlm2vec.files.documents import shown
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


@dataclass(frozen=True)
class FrameRule:
    """Which frames of a film an evaluation takes. `str(rule)` is what `FrameRule.parse` reads.

    Attributes:
        frames: how many, spread evenly; None takes all.
        fps: so many a second of a film file instead; frames that are stored one by one, whose rate nobody knows, are taken whole.
        max_frames: at most so many, by either rule.
        clips: how many of a clip, the candidate of moment retrieval; None: as of any film.
        rounded: places are rounded, not cut to integers (WeMM's evaluation).
        repeat: a film of fewer frames than asked for gives some of them twice (MMEB-V3's).
        whole_too: holds for tasks too that take all stored frames by themselves.

    Example:
        >>> FrameRule.parse("fps:1,max:64").take(list("abc"))
        ['a', 'b', 'c']
    """

    frames: int | None = FRAMES
    fps: float | None = None
    max_frames: int | None = None
    clips: int | None = None
    rounded: bool = False
    repeat: bool = False
    whole_too: bool = False

    @classmethod
    def parse(cls, text: str, *, whole_too: bool = True) -> "FrameRule":
        """A rule of "8", "all", "fps:1" or "fps:1,max:64", with further words behind commas: max:N, clips:N, rounded, repeat.

        Raises:
            ValueError: says which word is none of these, or which number is no number above 0.
        """
        words = [word.strip() for word in text.split(",")]
        known: dict[str, Any] = {"frames": None, "whole_too": whole_too}
        for at, word in enumerate(words):
            name, colon, value = word.partition(":")
            if at == 0 and (word == "all" or word.isdecimal()):
                known["frames"] = None if word == "all" else _number(text, word, int)
            elif colon and (name == "fps" if at == 0 else name in ("max", "clips")):
                kind, field = (float, "fps") if name == "fps" else (int, {"max": "max_frames", "clips": "clips"}[name])
                known[field] = _number(text, value, kind)
            elif at and word in ("rounded", "repeat"):
                known[word] = True
            else:
                raise ValueError(
                    f"frames {shown(text)}: expected N, all or fps:F, then max:N, clips:N, rounded or repeat behind commas, "
                    f"got {shown(word)}; write 8 or fps:1,max:64"
                )
        return cls(**known)

    def __str__(self) -> str:
        words = [f"fps:{self.fps:g}" if self.fps is not None else "all" if self.frames is None else str(self.frames)]
        words += [f"{word}:{value}" for word, value in (("max", self.max_frames), ("clips", self.clips)) if value is not None]
        return ",".join(words + [word for word in ("rounded", "repeat") if getattr(self, word)])

    @property
    def options(self) -> dict[str, float | None]:
        """The family options that read a film by this rule."""
        frames = {} if self.frames is None else {"frames": self.frames}
        return {**frames, "fps": self.fps, "max_frames": self.max_frames}

    def take(self, film: Sequence[Frame], *, clip: bool = False) -> list[Frame]:
        """The frames that are taken of frames that are stored one by one."""
        limits = [self.frames if self.fps is None else None, self.max_frames]
        limits = [self.clips] if clip and self.clips is not None else [limit for limit in limits if limit is not None]
        count = min(limits) if limits else len(film)
        if not film or (len(film) <= count and not self.repeat) or count == len(film):
            return list(film)
        if self.rounded and count > 1:
            return [film[round(i * (len(film) - 1) / (count - 1))] for i in range(count)]
        if len(film) < count:
            return [film[int(i * (len(film) - 1) / (count - 1))] for i in range(count)]
        return sample(film, count)


def _number(text: str, value: str, kind: type) -> Any:
    try:
        number = kind(value)
    except ValueError:
        number = None
    if number is None or not 0 < number < float("inf"):
        what = "an integer" if kind is int else "a number"
        raise ValueError(f"frames {shown(text)}: expected {what} above 0, got {shown(value)}; write 8 or fps:1,max:64")
    return number


def frame_files(folder: str | os.PathLike) -> list[str]:
    """Paths of the frame files in a folder, in natural order; [] when there is no such folder."""
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        return []
    names = sorted(sorted(os.listdir(folder)), key=natural_order)  # frame_1 and frame_01 are equal to natural_order
    return [os.path.join(folder, name) for name in names if name.lower().endswith(PICTURES)]
