"""Video frames: the stored ones, sampled as the reference samples them, or decoded from the video file with PyAV.

Sampling (MMEB-V2): indices are the integer part of linspace(0, n - 1, 8) over the naturally sorted frame files; a folder
with fewer than 8 frames is used whole. A video file is first reduced to at most 64 frames, every max(1, total // 64)-th
one from the start, which is how the stored frames were made.
"""

import os
import re
import shutil
from pathlib import Path

FRAMES = 8
SAVED = 64
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
VIDEOS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".gif")


def natural(path):
    """Sort key that puts frame_2 before frame_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", Path(path).name)]


def sample(frames, count=FRAMES):
    """`count` of the frames, evenly from first to last; all of them when there are fewer.

    Args: frames, a sequence in order; count >= 1 or None for all.
    """
    if count is None or len(frames) <= count:
        return list(frames)
    if count == 1:
        return [frames[0]]
    step = (len(frames) - 1) / (count - 1)
    last = len(frames) - 1
    # linspace hits its end exactly; i * step may fall short of it by a rounding
    return [frames[last if i == count - 1 else int(i * step)] for i in range(count)]


def stored_frames(folder):
    """Frame files of a folder in natural order; [] when there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((str(p) for p in folder.iterdir() if p.suffix.lower() in PICTURES), key=natural)


def decode_video(path, folder, limit=SAVED):
    """Decode a video file into FOLDER/0000.jpeg, ... ; whole or not at all.

    Returns: the frame files. Raises: ValueError naming the video when it is missing, has no picture stream or does not
    decode.
    """
    try:
        import av
    except ImportError:
        raise ValueError(f"{path}: decoding videos needs PyAV; pip install av, or unpack the stored frames") from None
    done = stored_frames(folder)
    if done:
        return done
    folder = Path(folder)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with av.open(str(path)) as video:
            if not video.streams.video:
                raise ValueError(f"{path}: no picture stream")
            stream = video.streams.video[0]
            stream.thread_type = "AUTO"
            total = stream.frames or sum(1 for _ in video.decode(stream))
            if not stream.frames:
                video.seek(0)
            step, saved = max(1, total // limit), 0
            for i, frame in enumerate(video.decode(stream)):
                if i % step == 0:
                    frame.to_image().save(part / f"{saved:04d}.jpeg", quality=95)
                    saved += 1
                if saved == limit:
                    break
    except (av.error.FFmpegError, OSError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise ValueError(f"{path}: the video does not decode ({error})") from None
    if not saved:
        shutil.rmtree(part, ignore_errors=True)
        raise ValueError(f"{path}: the video holds no frames")
    try:
        os.replace(part, folder)
    except OSError:  # another process was first
        shutil.rmtree(part, ignore_errors=True)
    return stored_frames(folder)


class VideoRoot:
    """Finds the frames of a task's videos.

    Args:
        task: its `frames` is a folder like video-tasks/frames/video_cls/UCF101.
        media: folder that holds video-tasks/, or the frame folders themselves. cache: where decoded frames go.
    """

    def __init__(self, task, media, cache):
        media = Path(media)
        names = [task.frames or task.name, (task.frames or "").removeprefix("video-tasks/frames/"), task.name]
        self.roots = [media / n for n in dict.fromkeys(names) if n and (media / n).is_dir()]
        raw = [n.replace("video-tasks/frames", "video-tasks/videos", 1) for n in names]
        self.raw = [media / n for n in dict.fromkeys(raw) if n and (media / n).is_dir()]
        self.looked = [str(media / n) for n in dict.fromkeys(names) if n]
        self.cache = Path(cache) / task.name

    def all_frames(self, name):
        """All stored frames of a video, or those of its file. ValueError naming the video when there are none."""
        stem = name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in VIDEOS else name
        for root in self.roots:
            for candidate in dict.fromkeys((name, stem)):
                found = stored_frames(root / candidate)
                if found:
                    return found
        for root in self.raw + self.roots:
            for suffix in ("", *VIDEOS):
                path = root / f"{stem}{suffix}" if suffix else root / name
                if path.is_file() and path.suffix.lower() in VIDEOS:
                    return decode_video(path, self.cache / stem.replace("/", "_"))
        raise ValueError(f"video {name!r}: no frames and no file in {', '.join(self.looked)}")

    def item(self, text, name, count=FRAMES):
        """Model input with the sampled frames, or with "unreadable": reason in place of them."""
        try:
            return {"text": text, "video": sample(self.all_frames(name), count)}
        except ValueError as error:
            return {"text": text, "video": None, "unreadable": str(error)}
