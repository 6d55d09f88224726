"""MMEB-V3's screens (GAE-Bench): texts with several screenshots on either side, each where its marker stands."""

from __future__ import annotations

import ast
from pathlib import Path, PurePosixPath
from typing import Any

from vlm2vec.evaluation.loaders.ids import id_text
from vlm2vec.evaluation.loaders.rows import open_rows, require_columns
from vlm2vec.evaluation.loaders.texts import tell_repeated, words
from vlm2vec.evaluation.tasks import Task
from vlm2vec.evaluation.tasks.task_data import Lazy, Pool, TaskData
from vlm2vec.files import AnyPath
from vlm2vec.files.documents import shown
from vlm2vec.inputs import IMAGE_MARKER


def screenshots(value: Any, where: str) -> list[str]:
    """Paths of a side: a list, a Python list written as text, or one path; null and "" are none, also inside a list.

    Raises: ValueError naming the row for anything else, and for a path that leaves the image folder.
    """
    if isinstance(value, str) and value.strip()[:1] == "[":
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"{where}: expected a list of image paths, got {shown(value)}") from None
    paths = list(value) if isinstance(value, (list, tuple)) else [value]
    paths = [path for path in paths if path is not None and path != ""]
    for path in paths:
        if not isinstance(path, str):
            raise ValueError(f"{where}: an image path is a text, got {shown(path)}")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"{where}: image path {path!r} leaves the image folder; expected a path relative to it")
    return paths


def side(text: str | None, paths: list[str], folder: Path, most: int | None = None) -> dict[str, Any]:
    """The model input of a side; of more than `most` screenshots the first ones stay, with their markers."""
    text = text or ""
    if most is not None and len(paths) > most:
        head, *tail = text.split(IMAGE_MARKER)
        text = IMAGE_MARKER.join([head, *tail[:most]]) + "".join(tail[most:])
        paths = paths[:most]
    images = [str(folder / path) for path in paths]
    return {"text": text, "image": images[0] if len(images) == 1 else images or None}


def load_screens(task: Task, root: AnyPath | None, media: AnyPath, **_: Any) -> TaskData:
    """Text or screens against screens. Every row is a query, also one whose id stands twice; one candidate is right.

    Options: `queries`, `corpus`: paths below the data folder. `most_images`: screenshots of a side at most. `merged`: the other
    published evaluation's view: queries of one id are one (first input, last label), a query whose id is a candidate's takes its
    input, and such candidates leave the pool.
    """
    o = task.options
    queries, corpus = open_rows(root, task, o["queries"], "queries"), open_rows(root, task, o["corpus"], "candidates")
    require_columns(queries, "qry_id", "qry_text", "qry_image_path", "pos_id", "pos_text", "pos_image_path")
    require_columns(corpus, "cand_id", "cand_text", "cand_image_path")
    folder, most = Path(media), o.get("most_images")
    data, pool = TaskData(task, held=(queries, corpus)), Pool()

    def maker(template, text, paths):
        return lambda row: side(words(template, row[text] or ""), screenshots(row[paths], task.name), folder, most)

    candidate = maker(task.target_prompt, "cand_text", "cand_image_path")
    positive = maker(task.target_prompt, "pos_text", "pos_image_path")
    query = maker(task.query_prompt, "qry_text", "qry_image_path")
    ids, rights = [], []
    for at, row in enumerate(queries):  # their candidates go before the corpus, and the first of a name stands (the reference's rule)
        where = queries.where(at)
        ids.append(id_text(row["qry_id"], f"{where}, qry_id"))
        screenshots(row["qry_image_path"], where)
        screenshots(row["pos_image_path"], where)
        data.queries.append(Lazy(queries, at, query))
        rights.append(id_text(row["pos_id"], f"{where}, pos_id"))
        pool.add(rights[-1], Lazy(queries, at, positive), rights[-1])
    stored: set[str] = set()
    for at, row in enumerate(corpus):
        where = corpus.where(at)
        name = id_text(row["cand_id"], f"{where}, cand_id")
        screenshots(row["cand_image_path"], where)
        if name in stored:
            data.problems.add("duplicate_candidates", at, f"{where}: {name}")
        stored.add(name)
        pool.add(name, Lazy(corpus, at, candidate), name)
    for at, right in enumerate(rights):
        if right not in stored:
            data.problems.add("added_candidates", at, f"{queries.where(at)}: {right}")
        data.labels.append([pool.index[right]])
        data.label_names.append([right])
    data.candidates, data.names = pool.items, pool.names
    if o.get("merged"):
        merge(data, ids)
    else:
        tell_repeated(data, ids, queries.source)
    return data


def merge(data: TaskData, ids: list[str]) -> None:
    """The merged view, see `load_screens`; `ids[i]` is query i's."""
    first = {name: at for at, name in reversed(list(enumerate(ids)))}
    last = {name: at for at, name in enumerate(ids)}
    of_name = dict(zip(data.names, data.candidates))
    order = list(dict.fromkeys(ids))
    data.queries = [of_name.get(name, data.queries[first[name]]) for name in order]
    data.label_names = [data.label_names[last[name]] for name in order]
    kept = [name for name in data.names if name not in first]
    index = {name: at for at, name in enumerate(kept)}
    data.candidates, data.names = [of_name[name] for name in kept], kept
    data.labels = [[index.get(name, -1) for name in names] for names in data.label_names]
