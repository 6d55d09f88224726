"""MMEB-V2's moment retrieval: find the clip of a video that a text (with an image or a video) describes."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from vlm2vec.evaluation.loaders.tables import read_table
from vlm2vec.evaluation.loaders.video_root import VideoRoot
from vlm2vec.evaluation.tasks import Task
from vlm2vec.evaluation.tasks.task_data import Pool, TaskData
from vlm2vec.files import AnyPath
from vlm2vec.media.sampling import natural_order


def load_moments(task: Task, root: AnyPath | None, media: AnyPath, *, hub: bool = False, protocol: str = "v2", cache: AnyPath) -> TaskData:
    """QVHighlight, Charades-STA: FRAMES/{video}/query and one folder per clip; "positive..." is right.

    A candidate's name is its folder's, below the task's frames. Clips come in natural order of their names (the reference takes the
    file system's).
    """
    o = task.options
    table = read_table(root, task, columns=[o["text"], o["video"]], hub=hub)
    videos, pool = VideoRoot(task, media, cache), Pool()
    data = TaskData(task, local=[])
    for i, row in enumerate(table):
        video = PurePosixPath(row[o["video"]]).stem
        data.queries.append(videos.item(task.query_prompt.replace("{text}", row[o["text"]] or ""), f"{video}/query"))
        folder = next((r / video for r in videos.roots if (r / video).is_dir()), None)
        clips = sorted((p for p in folder.iterdir() if p.is_dir() and p.name != "query"), key=natural_order) if folder else []
        mine, right, names = [], [], []
        for clip in clips:
            name = f"{video}/{clip.name}"
            where = pool.add(name, lambda name=name: videos.item(task.target_prompt, name, clip=True))
            mine.append(where)
            if clip.name.startswith("positive"):
                right.append(where)
                names.append(name)
        if not mine:
            data.problems.add("empty_candidates", i, f"row {i}: no clips of {video}")
        data.local.append(mine)
        data.labels.append(right or [-1])
        data.label_names.append(names or ["positive"])
    data.candidates, data.names = pool.items, pool.names
    return data


def load_momentseeker(
    task: Task, root: AnyPath | None, media: AnyPath, *, hub: bool = False, protocol: str = "v2", cache: AnyPath
) -> TaskData:
    """MomentSeeker: text, image or video queries against the positive and negative clips of the row.

    All stored frames of a clip are used, unless --frames says otherwise. Frames: FRAMES/video_frames/{path with _ for /}; query images:
    FRAMES/query_{name}.
    """
    columns = [task.options["text"], "positive_frames", "negative_frames", "input_frames"]
    table = read_table(root, task, columns=columns, hub=hub)
    videos, pool = VideoRoot(task, media, cache), Pool()
    data = TaskData(task, local=[])

    def flat(path):
        return "video_frames/" + path.split(".mp4")[0].replace("/", "_")

    def clip(path):
        name = flat(path)
        return pool.add(name, lambda: videos.item(task.target_prompt, name, clip=True, whole=True), name)

    for i, row in enumerate(table):
        given, text = row["input_frames"] or "", row[task.options["text"]] or ""
        kind = "video" if given.endswith(".mp4") else "image" if given.endswith(".jpg") else "text"
        prompt = task.query_prompt[kind].replace("{text}", text)
        if kind == "video":
            data.queries.append(videos.item(prompt, flat(given), whole=True))
        elif kind == "image":
            base = videos.roots[0] if videos.roots else Path(media)
            data.queries.append({"text": prompt, "image": str(base / f"query_{given}")})
        else:
            data.queries.append({"text": prompt})
        right = [clip(entry["output_path"]) for entry in row["positive_frames"] or []]
        wrong = [clip(entry["output_path"]) for entry in row["negative_frames"] or []]
        if not right + wrong:
            data.problems.add("empty_candidates", i, f"row {i}")
        data.local.append(list(dict.fromkeys(right + wrong)))
        data.labels.append(right or [-1])
        data.label_names.append([pool.names[r] for r in right] or ["positive"])
    data.candidates, data.names = pool.items, pool.names
    return data
