"""MMEB-V3's tools (ToolDe): a request against the documentation of every tool of its category."""

from __future__ import annotations

import json
import weakref
from typing import Any

from vlm2vec.evaluation.loaders.ids import CANDIDATE_IDS, QUERY_IDS, id_text, row_id
from vlm2vec.evaluation.loaders.rows import Rows, find_files, open_rows, require_columns
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


class Tools:
    """The tools of a corpus as candidates, and which of them are of each category ("" where the corpus tells none)."""

    def __init__(self, corpus: Rows, task: Task):
        text = as_lines if task.options.get("documentation") == "lines" else as_json
        self.corpus, self.pool = corpus, Pool()
        self.of_category: dict[str, list[int]] = {}
        self.noted: list[tuple[str, int, str]] = []  # problems, told to every task that reads these tools

        def make(row):
            return {"text": words(task.target_prompt, text(row["documentation"]))}

        for at, row in enumerate(corpus):
            where = corpus.where(at)
            name = row_id(row, CANDIDATE_IDS, where)
            if isinstance(documentation(row["documentation"]), str):
                self.noted.append(("not_json", at, f"{where}: {name}"))
            if name in self.pool.index:
                self.noted.append(("duplicate_candidates", at, f"{where}: {name}"))
            else:
                self.of_category.setdefault(str(row.get("category") or ""), []).append(self.pool.add(name, Lazy(corpus, at, make), name))


_shared: weakref.WeakValueDictionary[tuple, Tools] = weakref.WeakValueDictionary()  # nineteen tasks rank the same 37,292 tools


def read_tools(root: AnyPath | None, task: Task) -> Tools:
    """The task's tools; while a task that reads the same files in the same words is in use, they are its own."""
    files = [] if root is None else find_files(root, task.options["corpus"])
    stamps = tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    key = (stamps, task.target_prompt, task.options.get("documentation"))
    found = _shared.get(key)
    if found is None:
        corpus = open_rows(root, task, task.options["corpus"], "tools")
        require_columns(corpus, "documentation")
        found = _shared[key] = Tools(corpus, task)
    return found


def load_tools(task: Task, root: AnyPath | None, media: AnyPath, **_: Any) -> TaskData:
    """Requests against tools; several may be right, and any of them is a hit.

    The pool is the whole corpus; where the corpus tells categories (a `category` column) it is those of the query's category.
    Options: `queries` and `corpus` are paths below the data folder; `documentation: lines` writes tools as lines instead of JSON.
    """
    o = task.options
    queries, tools = open_rows(root, task, o["queries"], "queries"), read_tools(root, task)
    require_columns(queries, "query", "labels")
    data, ids = TaskData(task, grades=[], held=tools), []
    for kind_of, at, told in tools.noted:
        data.problems.add(kind_of, at, told)
    pool, of_category = tools.pool, tools.of_category
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
