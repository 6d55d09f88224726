"""MMEB's image tasks: the V1 rows (whole strings) and the V2 annotations (instruction and text apart), one loader.

V1 columns: qry_text, qry_img_path, tgt_text (list), tgt_img_path (list); the positive is entry 0. V2 adds qry_inst and
tgt_inst, from which the V1 strings are rebuilt. An unused side is the empty string. Image paths are relative to the
image root.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from vlm2vec.data.mmeb import EVAL_COLUMNS
from vlm2vec.evaluation.loaders.tables import read_table
from vlm2vec.evaluation.tasks import Task, load_tasks
from vlm2vec.evaluation.tasks.task_data import Pool, TaskData, unreadable
from vlm2vec.files import AnyPath
from vlm2vec.inputs import IMAGE_MARKER

V2_COLUMNS = ("qry_inst", "tgt_inst")


def item(text: str, image: str, root: AnyPath) -> dict[str, Any]:
    """Model input of one side; `"image": None` tells the model that a marker in the text is text (WebQA, EDIS).

    Raises: ValueError for a path that is absolute or climbs out of the image root.
    """
    if image and (PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts):
        raise ValueError(f"image path {image!r} leaves the image folder; expected a path relative to it")
    return {"text": text, "image": str(Path(root) / image) if image else None}


def _joined(*parts):
    return " ".join(p for p in parts if p)


def rebuild_query(form: str | None, instruction: str | None, text: str | None, has_image: bool, extra: str = "") -> str:
    """The V1 query string from V2's parts (TIGER-Lab/MMEB-V2's annotations against MMEB-eval's strings); `extra` is VisDial's newline."""
    instruction, text = instruction or "", text or ""
    if form == "image_t2i" or not has_image:
        return f"{instruction} {text}\n{extra}"
    instruction = instruction.replace(IMAGE_MARKER, "")
    if form in ("image_qa", "image_i2i_vg"):
        instruction = "\n" + instruction.strip()
    return _joined(f"{IMAGE_MARKER} {instruction}", text).replace(" \n", "\n") + "\n"


def rebuild_target(form: str | None, instruction: str | None, text: str | None, has_image: bool) -> str:
    """The V1 target string from V2's parts; text targets stay bare."""
    instruction, text = instruction or "", text or ""
    if not has_image:
        return text
    instruction = instruction.replace(IMAGE_MARKER, "")
    if text.strip():
        return f"{IMAGE_MARKER} {instruction} {text}".replace(" \n", "\n") + "\n"
    plain = f"{IMAGE_MARKER} {instruction}".replace(" \n", "\n")
    return plain + "\n" if form == "image_t2i" else plain


def candidate_name(form: str | None, text: str, path: str) -> str:
    """What V2 calls a candidate: the text, the image path, or "path:text" where both tell candidates apart."""
    if not path:
        return text
    if form == "image_i2i_vg" or (form is None and text):
        return f"{path}:{text.strip(chr(34))}"
    return path


def _as_list(value):
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _fault(row: dict[str, Any]) -> str | None:
    """Why a row cannot be scored, None where it can."""
    texts, paths = row["tgt_text"], row["tgt_img_path"]
    for column in ("qry_text", "qry_img_path"):
        if row[column] is not None and not isinstance(row[column], str):
            return f"{column} is text, got {type(row[column]).__name__}"
    if not isinstance(texts, list) or not isinstance(paths, list):
        return "tgt_text and tgt_img_path are lists, one entry per candidate"
    if len(texts) != len(paths):
        return f"{len(texts)} tgt_text but {len(paths)} tgt_img_path entries"
    for column, values in (("tgt_text", texts), ("tgt_img_path", paths)):
        other = next((value for value in values if not isinstance(value, (str, type(None)))), None)
        if other is not None:
            return f"{column} is a list of texts, got {type(other).__name__} in it"
    if not (row["qry_text"] or "").strip() and not _path(row["qry_img_path"]):
        return "neither query text nor query image"
    return None


def _path(value: str | None) -> str:
    """A path of a row, "" for null and for blanks."""
    return value if value and value.strip() else ""


def own_prompts(task: Task) -> Task:
    """The task with the prompts that its rows still lack: those of a task of one's own. Published rows hold theirs already."""
    published = load_tasks().get(task.name)
    if published is None:
        return task
    same = {key: None for key in ("query_prompt", "target_prompt") if getattr(task, key) == getattr(published, key)}
    return replace(task, **same)


def load_mmeb(task: Task, root: AnyPath | None, images: AnyPath, *, hub: bool = False, protocol: str = "v1", cache: AnyPath) -> TaskData:
    """Read one MMEB image task.

    Args:
        task: the Task; `form` tells how V2 strings are put together, the prompts of an own task wrap
            the rows' texts; the option `query_text` is every query's text;
            `instruction_apart` leaves texts bare and puts a row's qry_inst beside its query.
        root: folder of annotation folders. images: folder the image paths are relative to.
        protocol: "v1" keys candidates by (text, path); "v2" by name (text, path, or "path:text"), the first one wins.

    Returns: TaskData with local candidates (all of them when the task says global).
    Raises: ValueError that names file, column or row.
    """
    apart = bool(task.options.get("instruction_apart"))
    table = read_table(root, task, columns=(*EVAL_COLUMNS, *(V2_COLUMNS if apart else ())), hub=hub)
    parts = all(column in table.column_names for column in V2_COLUMNS)
    data, pool, prompted = TaskData(task, label_names=[], local=[]), Pool(), own_prompts(task)
    for i, row in enumerate(table):
        if (fault := _fault(row)) is not None:
            data.queries.append(unreadable(f"row {i}: {fault}"))
            data.local.append([])
            data.labels.append([-1])
            data.label_names.append([""])
            continue
        qry_text, qry_image = row["qry_text"] or "", _path(row["qry_img_path"])
        tgt_inst = _as_list(row["tgt_inst"]) if parts else [None]
        if "query_text" in task.options:
            query = task.options["query_text"]
        elif apart:
            query = qry_text
        elif parts:
            query = rebuild_query(task.form, row["qry_inst"], qry_text, bool(qry_image), task.options.get("query_end", ""))
        elif prompted.query_prompt:
            query = prompted.query_prompt.replace("{text}", qry_text)
        else:
            query = qry_text
        told = {"instruction": (row["qry_inst"] or "").replace(IMAGE_MARKER, "").strip()} if apart else {}
        data.queries.append({**item(query, qry_image, images), **told})
        mine = []
        for j, (text, path) in enumerate(zip(row["tgt_text"], row["tgt_img_path"])):
            text, path = text or "", _path(path)
            if not text and not path and not tgt_inst[j % len(tgt_inst)]:
                data.problems.add("absent_positive" if j == 0 else "unreadable_candidate", i, f"row {i}, candidate {j} is empty")
                mine.append(-1)
                continue
            key = (text, path) if protocol == "v1" else candidate_name(task.form, text, path)
            where = pool.index.get(key)
            if where is None:  # most rows of a task have the candidates of the rows before
                if apart:
                    full = text
                elif parts:
                    full = rebuild_target(task.form, tgt_inst[j % len(tgt_inst)], text, bool(path))
                else:
                    full = prompted.target_prompt.replace("{text}", text) if prompted.target_prompt else text
                where = pool.add(key, item(full, path, images), candidate_name(task.form, text, path))
            mine.append(where)
        real = [c for c in mine if c >= 0]
        if not real:
            data.problems.add("empty_candidates", i, f"row {i}")
        positive = mine[0] if mine else -1
        distinct = list(dict.fromkeys(real))
        if len(distinct) < len(real):
            data.problems.add("duplicate_candidates", i, f"row {i}: {len(real) - len(distinct)} repeated")
        data.local.append(distinct)
        data.labels.append([positive])
        data.label_names.append([pool.names[positive] if positive >= 0 else ""])
    data.candidates, data.names = pool.items, pool.names
    if task.candidates == "global":
        data.local = None
    return data
