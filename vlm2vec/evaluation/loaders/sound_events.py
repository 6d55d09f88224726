"""TUT sound events: find the part of a recording where an event is heard, among its other events and its background."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm2vec.evaluation.loaders.rows import place, read_rows
from vlm2vec.evaluation.loaders.texts import words
from vlm2vec.evaluation.tasks import Task
from vlm2vec.evaluation.tasks.task_data import Pool, TaskData
from vlm2vec.files import AnyPath
from vlm2vec.files.documents import shown
from vlm2vec.media.sounds import Sound

SHORTEST = 0.05  # seconds: an event without length is stretched to it
WINDOW, STEP, MOST_WINDOWS = 1.0, 0.5, 50  # background, in seconds, and how many of it
LEAST_OVERLAP = 0.1  # IoU with an event from which on a window is no background

Event = tuple[float, float, str]


def read_events(paths: list[Path]) -> dict[str, list[Event]]:
    """{recording: [(start, end, label)]} of label files: recording, scene, start, end, label, parted by tabs."""
    out: dict[str, list[Event]] = {}
    for path in paths:
        for at, row in enumerate(read_rows([path], header=False)):
            cells = list(row.values())
            if len(cells) < 5:
                raise ValueError(f"{path}, line {at + 1}: expected file, scene, start, end and label, got {len(cells)} columns")
            try:
                start, end = float(cells[2]), float(cells[3])
            except ValueError:
                raise ValueError(f"{path}, line {at + 1}: start and end are seconds, got {shown(cells[2])} and {shown(cells[3])}") from None
            out.setdefault(cells[0], []).append((start, end if end > start else start + SHORTEST, cells[4]))
    return out


def overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Intersection over union of two spans of time."""
    shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return shared / (max(a[1], b[1]) - min(a[0], b[0])) if shared else 0.0


def background(seconds: float, events: list[Event]) -> list[tuple[float, float]]:
    """The first windows of a recording that hardly overlap any event."""
    windows = []
    for number in range(int(max(0.0, seconds - WINDOW) / STEP) + 1 if seconds >= WINDOW else 0):
        span = (number * STEP, number * STEP + WINDOW)
        if all(overlap(span, event[:2]) < LEAST_OVERLAP for event in events):
            windows.append(span)
            if len(windows) == MOST_WINDOWS:
                break
    return windows


def seconds_of(path: Path) -> float:
    """Length of a recording. ValueError naming a file that cannot be read."""
    import wave

    from vlm2vec.media.sounds import RATE, read_sound

    try:
        with wave.open(str(path)) as file:
            return file.getnframes() / file.getframerate()
    except (wave.Error, EOFError):
        return len(read_sound(str(path), max_seconds=None)) / RATE
    except OSError as error:
        raise ValueError(f"sound {path}: cannot be read ({error.strerror})") from error


def load_sound_events(task: Task, root: AnyPath | None, media: AnyPath, **_: Any) -> TaskData:
    """A label and a whole recording against the events of the recording and up to 50 windows of its background.

    Options: `folder`, `labels` (names of the label files in it, {fold} for each of `folds`). Any event of the recording with the
    same label is right; with `exact: true` the query's own alone.
    """
    o, folder = task.options, place(task.options["folder"], root, media)
    names = [o["labels"].format(fold=fold) for fold in o.get("folds", [""])]
    paths = [found for name in names if (found := next(iter(sorted(folder.rglob(name))), None))]
    if len(paths) != len(names):
        raise ValueError(f"task {task.name}: expected {', '.join(names)} below {folder}, found {len(paths)} of them")
    data, pool = TaskData(task, local=[]), Pool()
    for recording, events in read_events(paths).items():
        file = next(
            (place / recording for place in (folder, *(path.parent for path in paths)) if (place / recording).is_file()), folder / recording
        )
        if not file.is_file():
            data.problems.add("dropped_queries", None, f"no recording {file}")
            continue

        def part(span, file=file, recording=recording):
            name = f"{recording}|{span[0]:.3f}-{span[1]:.3f}"
            return pool.add(name, {"text": task.target_prompt, "audio": Sound(str(file), *span)}, name)

        segments = [part(event[:2]) for event in events]
        mine = list(dict.fromkeys([*segments, *(part(span) for span in background(seconds_of(file), events))]))
        for at, (_start, _end, label) in enumerate(events):
            same = [segment for segment, event in zip(segments, events) if event[2] == label]
            right = [segments[at]] if o.get("exact") else list(dict.fromkeys(same))
            data.queries.append({"text": words(task.query_prompt, label), "audio": str(file)})
            data.local.append(mine)
            data.labels.append(right)
            data.label_names.append([pool.names[segment] for segment in right])
    if not data.queries:
        raise ValueError(f"task {task.name}: none of the recordings that {paths[0]} names is below {folder}")
    data.candidates, data.names = pool.items, pool.names
    return data
