"""Frames of a film with their times: from a film file (PyAV), a folder of frame files, or a list of frames as given.

Headers are not believed: a film that was cut without encoding it again says how many frames it once had. What counts is how
many come out, when each of them is shown, and how the film is to be turned.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

from vlm2vec.files import replacing_folder
from vlm2vec.media.endings import PICTURES
from vlm2vec.media.sampling import frame_files, frame_indices
from vlm2vec.media.sources import image_name, is_source_dict

STORED_FRAMES = 64  # of a film, in the frame folders that MMEB-V2 publishes


class Frames(list):
    """Frames of one film, in order.

    Attributes:
        seconds: when each frame is shown, in seconds from the film's first one; None where nobody knows.
    """

    def __init__(self, frames: Iterable[Any] = (), seconds: Sequence[float] | None = None):
        super().__init__(frames)
        if seconds is not None and len(seconds) != len(self):
            raise ValueError(f"expected a time for each frame, got {len(seconds)} times for {len(self)} frames")
        self.seconds = None if seconds is None else [float(second) for second in seconds]


def read_frames(
    video: str | os.PathLike | Sequence[Any], frames: int | None = None, *, fps: float | None = None, max_frames: int | None = None
) -> Frames:
    """Frames of one film, chosen by `vlm2vec.media.sampling`.

    Args:
        video: a film file or its bytes, a folder of frame files in natural order, or a list of frames.
        frames: how many to take from a file or folder, spread evenly; None takes all. A list is used as it is.
        fps: of a film file, so many frames a second instead. Folders and lists, whose rate nobody knows, are used whole.
        max_frames: at most so many, of any film.

    Returns:
        Paths of the frame files of a folder, RGB PIL images of a film file, the entries of a list. A film file's have their times.

    Raises:
        ValueError: names a file that is missing, cannot be decoded or has no frames.
    """
    if isinstance(video, (list, tuple)):
        if not video:
            raise ValueError("a video needs at least one frame, got an empty list")
        kept, times = frame_indices(len(video), None, max_frames=max_frames), getattr(video, "seconds", None)
        return Frames([video[i] for i in kept], None if times is None else [times[i] for i in kept])
    if is_source_dict(video):  # as `datasets` gives an undecoded film
        video = next((video[key] for key in ("bytes", "path") if video.get(key) is not None), video)
    if isinstance(video, (bytes, bytearray, memoryview)):
        return decode(bytes(video), lambda total, own_rate: frame_indices(total, frames, fps=fps, max_frames=max_frames, rate=own_rate))
    if not isinstance(video, (str, os.PathLike)):
        raise ValueError(f"expected a video file, a folder of frames or a list of frames, got {type(video).__name__}")
    path = os.fspath(video)
    if os.path.isdir(path):
        stored = frame_files(path)
        if not stored:
            raise ValueError(f"video folder {path}: no frame images ({', '.join(PICTURES)})")
        return Frames(stored[i] for i in frame_indices(len(stored), frames if fps is None else None, max_frames=max_frames))
    if not os.path.isfile(path):
        raise ValueError(f"video {path}: no such file or folder of frames")
    return decode(path, lambda total, own_rate: frame_indices(total, frames, fps=fps, max_frames=max_frames, rate=own_rate))


def unpack(path: str | os.PathLike, folder: str | os.PathLike, limit: int = STORED_FRAMES) -> list[str]:
    """Decode a film into FOLDER/0000.jpeg, ... as MMEB-V2's stored frames were made: at most `limit` frames, every
    max(1, total // limit)-th one from the start. The folder appears whole or not at all; one that is there is not made again.

    Returns:
        Paths of the frame files.

    Raises:
        ValueError: names the film when it is missing, cannot be decoded or has no frames.
    """
    stored = frame_files(folder)
    if stored:
        return stored

    def every_nth(total: int, rate: Fraction | None) -> range:
        step = max(1, total // limit)
        return range(0, min(total, limit * step), step)

    film = decode(path, every_nth)
    with replacing_folder(folder, durable=False, shared=True) as part:
        for number, frame in enumerate(film):
            frame.save(part / f"{number:04d}.jpeg", quality=95)
    return frame_files(folder)


def decode(film: str | os.PathLike | bytes, choose: Callable[[int, Fraction | None], Sequence[int]]) -> Frames:
    """RGB PIL images of the frames of a film file whose indices `choose(number of frames, frames a second)` names, in their order.

    The header's number, or, where it has none, that of the packets, is a guess: the film is decoded to its end, and where another
    number came out, frames are chosen again by the true one.

    Raises:
        ValueError: names the film when PyAV is not installed, or when it is missing, has no pictures or cannot be decoded.
    """
    path = image_name(film)
    try:
        import av
    except ImportError as error:
        raise ValueError(f"video {path}: reading video files needs PyAV; pip install av, or give the frames themselves") from error
    try:
        total, rate = _guess(film)
        taken, times = _decoded(film, choose(total, rate))
        if times is not None and len(times) != total:
            total, rate = len(times), _rate(times)
            taken, times = _decoded(film, choose(total, rate))
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"video {path}: cannot be decoded ({' '.join(str(error).split())[:200]})") from error
    if not taken:
        raise ValueError(f"video {path}: no frames")
    return Frames([image for image, _ in taken], [second for _, second in taken])


def _opened(film: str | os.PathLike | bytes) -> Any:
    import av

    return av.open(io.BytesIO(film) if isinstance(film, bytes) else os.fspath(film))


def _guess(path: str | os.PathLike | bytes) -> tuple[int, Fraction | None]:
    """How many frames a film says it has, and how many a second."""
    with _opened(path) as film:
        if not film.streams.video:
            raise ValueError(f"video {image_name(path)}: no video stream")
        stream = film.streams.video[0]
        total = stream.frames or sum(1 for packet in film.demux(stream) if packet.pts is not None and not packet.is_discard)
        return total, stream.average_rate


def _decoded(path: str | os.PathLike | bytes, indices: Sequence[int]) -> tuple[list[tuple[Any, float]], list[Fraction] | None]:
    """((picture, seconds) of each frame of `indices`, times of all frames); None for the times where the first frame was enough."""
    wanted, taken, times = frozenset(indices), [], []
    with _opened(path) as film:
        stream = film.streams.video[0]
        stream.thread_type = "AUTO"
        spare = 1 / (stream.average_rate or 1)  # between frames that bear no time
        for index, frame in enumerate(film.decode(stream)):
            times.append(times[-1] + spare if frame.pts is None and times else Fraction(frame.pts or 0) * (frame.time_base or 1))
            if index in wanted:
                taken.append((_turned(frame), float(times[-1] - times[0])))
                if wanted == {0}:
                    return taken, None
    return taken, times


def _rate(times: list[Fraction]) -> Fraction | None:
    """Frames a second of frames shown at these times."""
    length = times[-1] - times[0] if times else 0
    return ((len(times) - 1) / length).limit_denominator(1001) if length else None


def _turned(frame):
    """A frame as players show it: phones film sideways and say so."""
    from PIL.Image import Transpose

    image = frame.to_image()
    turns = round(getattr(frame, "rotation", 0) / 90) % 4  # counter-clockwise
    return image if not turns else image.transpose({1: Transpose.ROTATE_90, 2: Transpose.ROTATE_180, 3: Transpose.ROTATE_270}[turns])
