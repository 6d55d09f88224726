"""MCMR: a description against products of picture and text; several may be right."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from vlm2vec.evaluation.loaders.ids import id_text
from vlm2vec.evaluation.loaders.rows import open_rows, require_columns
from vlm2vec.evaluation.loaders.texts import id_list, tell_repeated, words
from vlm2vec.evaluation.tasks import Task
from vlm2vec.evaluation.tasks.task_data import Lazy, Pool, TaskData, asked, unreadable
from vlm2vec.files import AnyPath
from vlm2vec.files.documents import parse_json

DATE = "Date First Available"


def picture_names(row: dict[str, Any]) -> list[str]:
    """File names of a product's pictures: the last part of each address, without what follows a question mark."""
    images = row.get("images") or []
    addresses = [image.get("url") if isinstance(image, dict) else image for image in (images if isinstance(images, list) else [images])]
    return [PurePosixPath(str(address).split("?")[0]).name for address in addresses if address]


def _joined(value: Any, between: str) -> str:
    values = value if isinstance(value, (list, tuple)) else [value]
    return between.join(str(entry) for entry in values if entry is not None and entry != "")


def official_text(row: dict[str, Any]) -> str:
    """title, description, features, price and date, a line each; a field that is empty has no line."""
    fields = {
        "title": _joined(row.get("title"), " "),
        "description": _joined(row.get("description"), " "),
        "features": _joined(row.get("features"), " "),
        "price": _joined(row.get("price"), " "),
        DATE: _joined(row.get(DATE), " "),
    }
    return "\n".join(f"{name}: {value}" for name, value in fields.items() if value)


def other_text(row: dict[str, Any]) -> str:
    """The other published evaluation's fields, in its order; a price without "$" gets one."""
    price = _joined(row.get("price"), " ")
    fields = {
        "Title": _joined(row.get("title"), " "),
        "Description": _joined(row.get("description"), " "),
        "Price": price if "$" in price or not price else f"${price}",
        "Features": _joined(row.get("features"), "; "),
    }
    return "\n".join(f"{name}: {value}" for name, value in fields.items() if value)


def load_products(task: Task, root: AnyPath | None, media: AnyPath, **_: Any) -> TaskData:
    """Descriptions against products. A product's picture is the first of its addresses whose file name lies in the image folder.

    Options: `queries`, `corpus`: paths below the data folder. `layout: wemm` words products as the other published evaluation does,
    `image_needed` refuses one without any picture; officially it is fed as text.
    """
    o = task.options
    queries, corpus = open_rows(root, task, o["queries"], "queries"), open_rows(root, task, o["corpus"], "candidates")
    require_columns(queries, "qid", "query", "pos_ids")
    folder, text = Path(media), other_text if o.get("layout") == "wemm" else official_text
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    data, pool, ids = TaskData(task, held=corpus), Pool(), []

    def make(row):
        image = next((str(folder / name) for name in picture_names(row) if name in present), None)
        fed = words(task.target_prompt, text(row))
        if image is None:
            if o.get("image_needed"):
                return unreadable(f"product {row.get('candidate_id')}: none of its pictures is in {folder}")
            return {"text": fed.removeprefix("<|image_1|>").lstrip()}
        return {"text": fed, "image": image}

    for at, row in enumerate(corpus):
        where = corpus.where(at)
        name = id_text(row.get("candidate_id"), f"{where}, candidate_id")
        if name in pool.index:
            data.problems.add("duplicate_candidates", at, f"{where}: {name}")
        if not o.get("image_needed") and present.isdisjoint(picture_names(row)):
            data.problems.add("no_picture", at, f"{where}: {name}")
        pool.add(name, Lazy(corpus, at, make), name)
    for at, row in enumerate(queries):
        where = queries.where(at)
        ids.append(id_text(row["qid"], f"{where}, qid"))
        positives = row["pos_ids"]
        positives = parse_json(positives, f"{where}, pos_ids") if isinstance(positives, str) else positives
        names = id_list(positives, f"{where}, pos_ids")
        data.queries.append(asked(task.query_prompt, row["query"], at, "query"))
        data.labels.append([pool.index.get(name, -1) for name in names])
        data.label_names.append(names)
    tell_repeated(data, ids, queries.source)
    data.candidates, data.names = pool.items, pool.names
    return data
