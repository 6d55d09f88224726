"""Finds the frames of a task's videos among the folders that MMEB-V2 publishes, or unpacks the video files themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vlm2vec.evaluation.tasks import Task
from vlm2vec.media.endings import ANIMATED_PICTURES, FILMS
from vlm2vec.media.films import unpack
from vlm2vec.media.sampling import FrameRule, frame_files

ENDINGS = FILMS + ANIMATED_PICTURES


class VideoRoot:
    """Finds the frames of a task's videos.

    Args:
        task: its `frames` is a folder like video-tasks/frames/video_cls/UCF101; its option `films` one with film files.
        media: folder that holds video-tasks/, or the frame folders themselves. cache: where decoded frames go.
    """

    def __init__(self, task: Task, media: str | os.PathLike, cache: str | os.PathLike):
        media = Path(media)
        names = [task.frames or task.name, (task.frames or "").removeprefix("video-tasks/frames/"), task.name]
        self.roots = [media / n for n in dict.fromkeys(names) if n and (media / n).is_dir()]
        films = [task.options["films"]] if task.options.get("films") else []
        film_folders = films + [n.replace("video-tasks/frames", "video-tasks/videos", 1) for n in names]
        self.film_roots = [media / n for n in dict.fromkeys(film_folders) if n and (media / n).is_dir()]
        self.looked = [str(media / n) for n in dict.fromkeys([*names, *films]) if n]
        self.cache = Path(cache) / task.name
        self.rule: FrameRule = task.options.get("frame_rule") or FrameRule()

    def all_frames(self, name: str) -> list[str]:
        """Paths of all stored frames of a video, or of those of its file. ValueError naming the video when there are none."""
        stem = name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in ENDINGS else name
        for root in self.roots:
            for candidate in dict.fromkeys((name, stem)):
                stored = frame_files(root / candidate)
                if stored:
                    return stored
        for root in self.film_roots + self.roots:
            for suffix in ("", *ENDINGS):
                path = root / f"{stem}{suffix}" if suffix else root / name
                if path.is_file() and path.suffix.lower() in ENDINGS:
                    return unpack(path, self.cache / stem.replace("/", "_"))
        raise ValueError(f"video {name!r}: no frames and no file in {', '.join(self.looked)}")

    def item(self, text: str, name: str, *, clip: bool = False, whole: bool = False) -> dict[str, Any]:
        """Model input with the frames that the task's `frame_rule` takes, or with "unreadable": reason in place of them.

        Args:
            clip: the film is a candidate of moment retrieval, of which a rule may take fewer.
            whole: the task takes all stored frames, unless the rule says that it holds here too.
        """
        try:
            stored = self.all_frames(name)
        except ValueError as error:
            return {"text": text, "video": None, "unreadable": str(error)}
        return {"text": text, "video": stored if whole and not self.rule.whole_too else self.rule.take(stored, clip=clip)}
