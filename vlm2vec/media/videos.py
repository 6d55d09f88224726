"""Frames of a video: from a file (PyAV), a folder of frames, or a list of frames as given."""

import os

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def sample(total: int, wanted: int) -> list[int]:
    """Indices of `wanted` frames spread evenly from the first to the last, all of them when there are fewer."""
    if total <= wanted:
        return list(range(total))
    if wanted == 1:
        return [0]
    return [round(i * (total - 1) / (wanted - 1)) for i in range(wanted)]


def read_frames(video, frames: int) -> list:
    """Frames of one video.

    Args:
        video: a list of frames (used as given, all of them), a folder of frame images in name order, or a video file.
        frames: how many frames to take, spread evenly, from a file or folder.

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
        names = sorted(n for n in os.listdir(path) if n.lower().endswith(IMAGE_SUFFIXES))
        if not names:
            raise ValueError(f"video folder {path}: no frame images ({', '.join(IMAGE_SUFFIXES)})")
        return [os.path.join(path, names[i]) for i in sample(len(names), frames)]
    if not os.path.isfile(path):
        raise ValueError(f"video {path}: no such file or folder of frames")
    return _decode(path, frames)


def _decode(path: str, frames: int) -> list:
    try:
        import av
    except ImportError as e:
        raise ValueError(f"video {path}: reading video files needs PyAV; pip install av, or give the frames as a list") from e
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise ValueError(f"video {path}: no video stream")
            stream = container.streams.video[0]
            # A container's frame count may be absent or wrong; counting packets costs no decoding.
            total = stream.frames or sum(1 for p in container.demux(stream) if p.pts is not None)
            container.seek(0)
            wanted, kept = set(sample(total, frames)), []
            for i, frame in enumerate(container.decode(video=0)):
                if i in wanted:
                    kept.append(frame.to_image())
                    if len(kept) == len(wanted):
                        break
    except (av.error.FFmpegError, OSError) as e:
        raise ValueError(f"video {path}: cannot be decoded ({e})") from e
    if not kept:
        raise ValueError(f"video {path}: no frames")
    return kept
