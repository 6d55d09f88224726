"""MMEB-V2's visual documents (ViDoRe, VisRAG, ViDoSeek, MMLongBench): BEIR tables, graded labels, all pages ranked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm2vec.evaluation.loaders.tables import read_table
from vlm2vec.evaluation.tasks import Task
from vlm2vec.evaluation.tasks.task_data import Pool, TaskData, asked
from vlm2vec.files import AnyPath, write_bytes
from vlm2vec.files.documents import shown


def stored_name(corpus_id: str) -> str:
    """File name of a page: the first 50 characters of the stem, "_", 8 hex digits of the full name's md5, the extension."""
    stem, suffix = os.path.splitext(corpus_id)
    return f"{stem[:50]}_{hashlib.md5(corpus_id.encode()).hexdigest()[:8]}{suffix}".replace("/", "_")


def _page(corpus_id, image, task, media, cache):
    """Path of a page's picture: in the media folder as the reference stores it, or written from the table's bytes."""
    names = [stored_name(corpus_id), str(corpus_id), f"{corpus_id}.png", f"{corpus_id}.jpg"]
    if isinstance(image, str):
        names.insert(0, image)
    elif isinstance(image, dict) and not image.get("bytes") and image.get("path"):
        names.insert(0, image["path"])
    for base in (Path(media) / task.name, Path(media)):
        for name in names:
            if (base / name).is_file():
                return str(base / name)
    content = image.get("bytes") if isinstance(image, dict) else None
    path = Path(cache) / task.name / stored_name(str(corpus_id))
    if content is None:
        return str(Path(media) / task.name / names[0])
    if not path.is_file() or path.stat().st_size != len(content):
        write_bytes(path, content, durable=False)
    return str(path)


def read_qrels(table: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{query id: {corpus id: grade}}; only grades above 0, the highest one when a pair repeats."""
    out = {}
    for at, row in enumerate(table):
        try:
            grade = float(row["score"])
        except (TypeError, ValueError):
            raise ValueError(f"qrels, row {at}: score should be a number, got {shown(row['score'])}") from None
        if grade > 0:
            page = out.setdefault(row["query-id"], {})
            page[row["corpus-id"]] = max(grade, page.get(row["corpus-id"], 0.0))
    return out


def load_documents(
    task: Task, root: AnyPath | None, media: AnyPath, *, hub: bool = False, protocol: str = "v2", cache: AnyPath = "media"
) -> TaskData:
    """Text query -> page images. Options: `language` keeps the queries whose `language` column equals it."""
    from datasets import Image

    queries = read_table(root, task, "queries", columns=("query-id", "query"), hub=hub)
    corpus = read_table(root, task, "corpus", columns=("corpus-id", "image"), hub=hub)
    qrels = read_qrels(read_table(root, task, "qrels", columns=("query-id", "corpus-id", "score"), hub=hub))
    if isinstance(corpus.features["image"], Image):
        corpus = corpus.cast_column("image", Image(decode=False))
    data, pool = TaskData(task, grades=[]), Pool()
    for i, row in enumerate(corpus.select_columns(["corpus-id", "image"])):
        name = row["corpus-id"]
        if name in pool.index:
            data.problems.add("duplicate_candidates", i, f"corpus row {i}: {name}")
            continue
        path = _page(name, row["image"], task, media, cache)
        pool.add(name, {"text": task.target_prompt, "image": path}, str(name))
    if task.options.get("language"):
        queries = queries.filter(lambda language: language == task.options["language"], input_columns="language")
    for i, row in enumerate(queries):
        relevant = qrels.get(row["query-id"], {})
        data.queries.append(asked(task.query_prompt, row["query"], i, "query"))
        data.labels.append([pool.index.get(name, -1) for name in relevant])
        data.label_names.append([str(name) for name in relevant])
        data.grades.append([int(g) if g == int(g) else g for g in relevant.values()])
    data.candidates, data.names = pool.items, pool.names
    return data
