"""MMEB-V3's memories (LMEB): a folder whose sub-folders hold queries and judgements, ranked together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vlm2vec.evaluation.loaders.ids import QUERY_IDS, QUERY_TEXTS, id_text, pick, read_judgements, row_id
from vlm2vec.evaluation.loaders.rows import Held, Rows, read_rows
from vlm2vec.evaluation.loaders.texts import add_labels, corpus_pool, id_list, tell_repeated, words
from vlm2vec.evaluation.tasks import Task
from vlm2vec.evaluation.tasks.task_data import Pool, TaskData
from vlm2vec.files import AnyPath
from vlm2vec.files.documents import read_object

QUERIES = ("queries.jsonl", "queries.parquet", "query.jsonl", "query.parquet")
JUDGEMENTS = tuple(f"{stem}.{ending}" for stem in ("qrels", "qrels/test") for ending in ("tsv", "jsonl", "parquet"))
CORPUS = tuple(f"{stem}.{ending}" for stem in ("corpus", "documents") for ending in ("jsonl", "parquet"))
OWN_LISTS = ("candidates.jsonl", "candidates.parquet")


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def parts_of(folder: Path) -> list[Path]:
    """Sub-folders with queries and judgements, in the order of their names; the folder itself where it has them."""
    found = [Path(at) for at, _, _ in os.walk(folder, followlinks=True)]
    return sorted(part for part in found if _first(part, QUERIES) and _first(part, JUDGEMENTS))


def _nearest(part: Path, folder: Path, names: tuple[str, ...]) -> Path | None:
    """A file of the part itself or of the nearest folder above it, up to the data set's."""
    for place in (part, *part.parents):
        found = _first(place, names)
        if found or place == folder:
            return found
    return None


def judgement_rows(path: Path) -> Rows:
    """The table of judgements of any of its forms; a tsv is query, document, grade, or TREC's with Q0 (or 0) second."""
    if path.suffix != ".tsv":
        return read_rows([path])
    rows = read_rows([path], header=False)
    out = []
    for at, row in enumerate(rows):
        cells = list(row.values())
        if at == 0 and not _is_number(cells[-1]):
            continue  # a line of names
        if len(cells) == 4 and cells[1] in ("Q0", "0"):
            del cells[1]
        if len(cells) != 3:
            raise ValueError(f"{path}, line {at + 1}: expected query, document and grade, got {len(cells)} columns")
        out.append({"query_id": cells[0], "corpus_id": cells[1], "score": cells[2]})
    return Held([path], [out])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def instruction_for(told: dict[str, Any], task: Task, data_set: str, part: str, source: str) -> str:
    """A part's instruction: under [data set][part], else under [data set][data set]. ValueError names what is missing."""
    entry = told.get(data_set)
    found = entry.get(part, entry.get(data_set)) if isinstance(entry, dict) else None
    if not isinstance(found, str):
        raise ValueError(f"task {task.name}: {source} has no instruction [{data_set!r}][{part!r}], nor [{data_set!r}][{data_set!r}]")
    return found


def own_lists(part: Path, names: tuple[str, ...] = OWN_LISTS) -> dict[str, list[str]] | None:
    """{scene: candidate ids} of a part's file of candidates, None without one."""
    path = _first(part, names)
    if path is None:
        return None
    rows = read_rows([path])
    return {
        id_text(row.get("scene_id"), f"{rows.where(at)}, scene_id"): id_list(
            row.get("candidate_doc_ids"), f"{rows.where(at)}, candidate_doc_ids"
        )
        for at, row in enumerate(rows)
    }


def load_memories(task: Task, root: AnyPath | None, media: AnyPath, **_: Any) -> TaskData:
    """All parts of a data set as one task. Ids are prefixed with the folder they stand in, so that equal ones stay apart.

    Options: `folder`, `instructions`: below the data folder. With `candidates: local` a query is ranked inside the list of its
    `scene_id`, or of its own id where it has none; if one query has no list, all are ranked against everything, and that is told.
    """
    o, base = task.options, Path(root or ".")
    folder = base / o["folder"]
    parts = parts_of(folder)
    if not parts:
        raise ValueError(
            f"task {task.name}: no queries and judgements below {folder}; expected sub-folders with {QUERIES[0]} and {JUDGEMENTS[0]}"
        )
    told = read_object(base / o["instructions"])
    data, pool, corpora, ids = TaskData(task, grades=[], held=[], local=[]), Pool(), {}, []
    for part in parts:
        path = _nearest(part, folder, CORPUS)
        if path is None:
            raise ValueError(f"task {task.name}: no corpus for {part}; expected {CORPUS[0]} there or above it")
        prefix = f"{path.parent.relative_to(folder.parent).as_posix()}::"
        if path not in corpora:
            corpora[path] = read_rows([path])
            data.held.append(corpora[path])
            corpus_pool(data, corpora[path], task, prefix, pool)
        _add_part(data, pool, task, part, folder, prefix, instruction_for(told, task, folder.name, part.name, o["instructions"]), ids)
    tell_repeated(data, ids, str(folder))
    if task.candidates == "global" or data.problems.rows.get("own_list_missing"):
        data.local = None
    data.candidates, data.names = pool.items, pool.names
    return data


def _add_part(data, pool, task, part, folder, prefix, instruction, ids):
    """The queries of one part."""
    queries, judged = read_rows([_first(part, QUERIES)]), read_judgements(judgement_rows(_first(part, JUDGEMENTS)))
    lists = own_lists(part) if task.candidates == "local" else None
    for at, row in enumerate(queries):
        where = queries.where(at)
        name, text = row_id(row, QUERY_IDS, where), pick(row, QUERY_TEXTS)
        if text is None or not str(text).strip():
            data.problems.add("dropped_queries", len(data.queries), f"{where}: {name} has no text")
            continue
        ids.append(f"{part.relative_to(folder.parent).as_posix()}::{name}")
        data.queries.append({"text": words(task.query_prompt, str(text), instruction)})
        add_labels(data, pool, {prefix + right: grade for right, grade in judged.get(name, {}).items()})
        if task.candidates == "local":
            scene = pick(row, ("scene_id",))
            mine = (lists or {}).get(name if scene is None else id_text(scene, where))
            if mine is None:
                data.problems.add("own_list_missing", len(data.queries) - 1, f"{where}: {name}")
            data.local.append([pool.index[prefix + c] for c in mine or [] if prefix + c in pool.index])
