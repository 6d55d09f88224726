"""Text retrieval in three files (BEIR's layout): queries, corpus, judgements; or queries that name their gold ids themselves (BRIGHT)."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vlm2vec.evaluation.loaders.ids import CANDIDATE_IDS, QUERY_IDS, QUERY_TEXTS, id_text, pick, plain_grade, read_judgements, row_id
from vlm2vec.evaluation.loaders.rows import Rows, open_rows
from vlm2vec.evaluation.tasks import Task
from vlm2vec.evaluation.tasks.task_data import Lazy, Pool, TaskData
from vlm2vec.files import AnyPath

GOLD = ("gold_ids", "gold_ids_long")
NOTHING_EXCLUDED = "N/A"  # what BRIGHT writes where a query excludes nothing


def words(template: str, text: str, instruction: str = "") -> str:
    """A text in its template; the query is put in last, so that braces in it stay text."""
    return template.replace("{instruction}", instruction).replace("{text}", text)


def passage(row: dict[str, Any]) -> str:
    """A candidate's text: title and text on two lines where it has both."""
    parts = (row.get("title"), row.get("text") or row.get("content"))
    return "\n".join(str(part) for part in parts if part)


def corpus_pool(data: TaskData, rows: Rows, task: Task, prefix: str = "", pool: Pool | None = None) -> Pool:
    """Every row of a corpus as a candidate under its id, read from its file on demand; `prefix` stands before the ids."""
    pool = Pool() if pool is None else pool

    def make(row):
        return {"text": words(task.target_prompt, passage(row))}

    for at, row in enumerate(rows):
        where = rows.where(at)
        name = prefix + row_id(row, CANDIDATE_IDS, where)
        if not passage(row).strip():
            data.problems.add("dropped_candidates", at, f"{where}: {name} has no text")
        elif name in pool.index:
            data.problems.add("duplicate_candidates", at, f"{where}: {name}")
        else:
            pool.add(name, Lazy(rows, at, make), name)
    return pool


def tell_repeated(data: TaskData, ids: list[str], source: str) -> None:
    """Count query ids that stand more than once."""
    counts = Counter(ids)
    for at, name in enumerate(ids):
        if counts[name] > 1:
            data.problems.add("duplicate_queries", at, f"{source}: {name}")


def id_list(value: Any, where: str) -> list[str]:
    """A row's list of ids as text, in its order, each once; null is an empty list."""
    if value is not None and not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: expected a list of ids, got {type(value).__name__}")
    return list(dict.fromkeys(id_text(entry, where) for entry in value or []))


def add_labels(data: TaskData, pool: Pool, relevant: dict[str, float]) -> None:
    """The right candidates of the next query, {id: grade}."""
    data.labels.append([pool.index.get(name, -1) for name in relevant])
    data.label_names.append(list(relevant))
    data.grades.append([plain_grade(grade) for grade in relevant.values()])


def load_texts(task: Task, root: AnyPath | None, media: AnyPath, **_: Any) -> TaskData:
    """Queries against all passages.

    Options: `queries`, `corpus`, `qrels` are paths below the data folder; without `qrels` a query's `gold_ids` (else `gold_ids_long`)
    are right, with grade 1. `instruction` is the column that stands before a query. A query's `excluded_ids` are ranked with the rest,
    as the reference does, and the score without them stands beside.
    """
    o = task.options
    queries, corpus = open_rows(root, task, o["queries"], "queries"), open_rows(root, task, o["corpus"], "corpus")
    judged = read_judgements(open_rows(root, task, o["qrels"], "judgements")) if o.get("qrels") else None
    data = TaskData(task, grades=[], held=corpus)
    pool, ids, excluded = corpus_pool(data, corpus, task), [], []
    for at, row in enumerate(queries):
        where = queries.where(at)
        name, text = row_id(row, QUERY_IDS, where), pick(row, QUERY_TEXTS)
        if text is None or not str(text).strip():
            data.problems.add("dropped_queries", at, f"{where}: {name} has no text")
            continue
        instruction = row.get(o["instruction"]) if o.get("instruction") else ""
        if o.get("instruction") and not instruction:
            raise ValueError(f"{where}: no {o['instruction']}, which stands before the query in task {task.name}")
        if judged is not None:
            relevant = judged.get(name, {})
        else:
            relevant = dict.fromkeys(id_list(pick(row, GOLD) or row.get(GOLD[1]), where), 1.0)
        ids.append(name)
        data.queries.append({"text": words(task.query_prompt, str(text), instruction)})
        add_labels(data, pool, relevant)
        without = [name for name in id_list(row.get("excluded_ids"), where) if name != NOTHING_EXCLUDED]
        excluded.append([pool.index[name] for name in without if name in pool.index])
    tell_repeated(data, ids, queries.source)
    data.excluded = excluded if any(excluded) else None
    data.candidates, data.names = pool.items, pool.names
    return data
