"""Frames of a film: from a film file (PyAV), a folder of frame files, or a list of frames as given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vlm2vec.files import replacing_folder
from vlm2vec.media.endings import PICTURES
from vlm2vec.media.sampling import frame_files, frame_indices, sample

STORED_FRAMES = 64  # of a film, in the frame folders that MMEB-V2 publishes


def read_frames(video: str | os.PathLike | Sequence[Any], frames: int | None) -> list[Any]:
    """Frames of one film, chosen by `vlm2vec.media.sampling`.

    Args:
        video: a list of frames (used as given, all of them), a folder of frame files in natural order, or a film file.
        frames: how many frames to take from a file or folder, spread evenly; None takes all.

    Returns:
        Paths of the frame files of a folder, RGB PIL images of a film file, the entries of a list.

    Raises:
        ValueError: names a file that is missing, cannot be decoded or has no frames.
    """
    if isinstance(video, (list, tuple)):
        if not video:
            raise ValueError("a video needs at least one frame, got an empty list")
        return list(video)
    if not isinstance(video, (str, os.PathLike)):
        raise ValueError(f"expected a video file, a folder of frames or a list of frames, got {type(video).__name__}")
    path = os.fspath(video)
    if os.path.isdir(path):
        stored = frame_files(path)
        if not stored:
            raise ValueError(f"video folder {path}: no frame images ({', '.join(PICTURES)})")
        return sample(stored, frames)
    if not os.path.isfile(path):
        raise ValueError(f"video {path}: no such file or folder of frames")
    return list(decode(path, lambda total: frame_indices(total, frames)))


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

    def every_nth(total: int) -> range:
        step = max(1, total // limit)
        return range(0, limit * step, step)

    with replacing_folder(folder, durable=False, shared=True) as part:
        for number, frame in enumerate(decode(path, every_nth)):
            frame.save(part / f"{number:04d}.jpeg", quality=95)
    return frame_files(folder)


def decode(path: str | os.PathLike, choose: Callable[[int], Sequence[int]]) -> Iterator[Any]:
    """RGB PIL images of the frames of a film file whose indices `choose(number of frames)` names, in their order.

    The number is the header's, or, where that has none, the number of packets: counting those costs no decoding.

    Raises:
        ValueError: names the film when PyAV is not installed, or when it is missing, has no pictures or cannot be decoded.
    """
    path = os.fspath(path)
    try:
        import av
    except ImportError as error:
        raise ValueError(f"video {path}: reading video files needs PyAV; pip install av, or give the frames themselves") from error
    taken = 0
    try:
        with av.open(path) as film:
            if not film.streams.video:
                raise ValueError(f"video {path}: no video stream")
            stream = film.streams.video[0]
            stream.thread_type = "AUTO"
            total = stream.frames or sum(1 for packet in film.demux(stream) if packet.pts is not None)
            film.seek(0)
            wanted = choose(total)
            at = frozenset(wanted)
            for index, frame in enumerate(film.decode(stream)):
                if index in at:
                    yield frame.to_image()
                    taken += 1
                    if taken == len(at):
                        break
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"video {path}: cannot be decoded ({error})") from error
    if not taken:
        raise ValueError(f"video {path}: no frames")
