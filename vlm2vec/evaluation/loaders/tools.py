"""MMEB-V3's tools (ToolDe): a request against the documentation of every tool of its category."""

from __future__ import annotations

import json
from typing import Any

from vlm2vec.evaluation.loaders.ids import CANDIDATE_IDS, QUERY_IDS, id_text, row_id
from vlm2vec.evaluation.loaders.rows import Rows, open_rows, require_columns
from vlm2vec.evaluation.loaders.texts import add_labels, tell_repeated, words
from vlm2vec.evaluation.tasks import Task
from vlm2vec.evaluation.tasks.task_data import Lazy, Pool, TaskData, unreadable
from vlm2vec.files import AnyPath
from vlm2vec.files.documents import kind, parse_json, shown

FIELDS = ("parameters", "doc_arguments", "api_call", "domain", "framework", "tool_profile")


def documentation(value: Any) -> Any:
    """A tool's documentation as data: a JSON text is read, anything else and a text that is no JSON stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def as_json(value: Any) -> str:
    """The official text of a tool: its documentation as JSON, other letters than ASCII escaped; what is no JSON as it is."""
    value = documentation(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=True)


def as_lines(value: Any) -> str:
    """The other published evaluation's text: name, description, then a line for each field that the documentation has."""
    value = documentation(value)
    if not isinstance(value, dict):
        return as_json(value)
    lines = [f"{title}: {value[key]}" for title, key in (("Tool", "name"), ("Description", "description")) if value.get(key)]
    for name in FIELDS:
        if value.get(name):
            told = value[name] if isinstance(value[name], str) else json.dumps(value[name], ensure_ascii=False)
            lines.append(f"{name}: {told}")
    return "\n".join(lines)


def _labels(value: Any, where: str) -> dict[str, float]:
    """{tool id: 1} of a row's labels: a JSON text, or a list, of {"id":, ...}."""
    found = parse_json(value, f"{where}, labels") if isinstance(value, str) else value
    if not isinstance(found, list):
        raise ValueError(f"{where}: labels should be a list of tools, got {kind(found)}")
    for entry in found:
        if not isinstance(entry, dict) or "id" not in entry:
            raise ValueError(f'{where}: a label is an object with "id", got {kind(entry)}')
    return {id_text(entry["id"], f"{where}, labels"): 1.0 for entry in found}


def _pool(data: TaskData, corpus: Rows, task: Task) -> tuple[Pool, dict[str, list[int]]]:
    """Tools as candidates, and which of them are of each category ("" where the corpus tells none)."""
    pool, text = Pool(), as_lines if task.options.get("documentation") == "lines" else as_json
    of_category: dict[str, list[int]] = {}

    def make(row):
        return {"text": words(task.target_prompt, text(row["documentation"]))}

    for at, row in enumerate(corpus):
        where = corpus.where(at)
        name = row_id(row, CANDIDATE_IDS, where)
        if isinstance(documentation(row["documentation"]), str):
            data.problems.add("not_json", at, f"{where}: {name}")
        if name in pool.index:
            data.problems.add("duplicate_candidates", at, f"{where}: {name}")
        else:
            of_category.setdefault(str(row.get("category") or ""), []).append(pool.add(name, Lazy(corpus, at, make), name))
    return pool, of_category


def load_tools(task: Task, root: AnyPath | None, media: AnyPath, **_: Any) -> TaskData:
    """Requests against tools; several may be right, and any of them is a hit.

    The pool is the whole corpus; where the corpus tells categories (a `category` column) it is those of the query's category.
    Options: `queries` and `corpus` are paths below the data folder; `documentation: lines` writes tools as lines instead of JSON.
    """
    o = task.options
    queries, corpus = open_rows(root, task, o["queries"], "queries"), open_rows(root, task, o["corpus"], "tools")
    require_columns(queries, "query", "labels")
    require_columns(corpus, "documentation")
    data, ids = TaskData(task, grades=[], held=corpus), []
    pool, of_category = _pool(data, corpus, task)
    data.local = [] if len(of_category) > 1 else None
    for at, row in enumerate(queries):
        where = queries.where(at)
        ids.append(row_id(row, QUERY_IDS, where))
        text, instruction = row["query"], row.get("instruction") or ""
        if not text or not str(text).strip():
            data.queries.append(unreadable(f"row {at}: no query"))
        else:
            data.queries.append({"text": words(task.query_prompt, str(text), instruction) if instruction else str(text)})
        add_labels(data, pool, _labels(row["labels"], where))
        if data.local is not None:
            if row.get("category") not in of_category:
                raise ValueError(f"{where}: category {shown(row.get('category'))} has no tools; the corpus has {', '.join(of_category)}")
            data.local.append(of_category[row["category"]])
    tell_repeated(data, ids, queries.source)
    data.grades = None
    data.candidates, data.names = pool.items, pool.names
    return data
