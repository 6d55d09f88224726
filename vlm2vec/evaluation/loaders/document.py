"""Visual documents (ViDoRe V1 to V3, VisRAG, ViDoSeek, MMLongBench): BEIR tables, graded labels, all pages ranked.

Three layouts: queries, corpus and qrels with `query-id` and `corpus-id` (MMEB-V2, ViDoRe V1 and V2); the same with underscores (ViDoRe
V3); and mteb's, {language}-queries, {language}-corpus and {language}-qrels with `id` and `text`.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlm2vec.evaluation.loaders.ids import id_text, plain_grade
from vlm2vec.evaluation.loaders.tables import languages_of, read_table, unmended
from vlm2vec.evaluation.loaders.texts import tell_repeated
from vlm2vec.evaluation.tasks import Task
from vlm2vec.evaluation.tasks.task_data import Pool, TaskData, asked
from vlm2vec.files import AnyPath, write_bytes
from vlm2vec.files.documents import shown

QUERY, PAGE = ("query-id", "query_id", "id", "_id"), ("corpus-id", "corpus_id", "id", "_id")
TEXT = ("query", "text")


def stored_name(corpus_id: str) -> str:
    """File name of a page: the first 50 characters of the stem, "_", 8 hex digits of the full name's md5, the extension."""
    stem, suffix = os.path.splitext(corpus_id)
    return f"{stem[:50]}_{hashlib.md5(corpus_id.encode()).hexdigest()[:8]}{suffix}".replace("/", "_")


def _page(name, image, task, media, cache):
    """Path of a page's picture: in the media folder as the reference stores it, or written from the table's bytes."""
    names = [stored_name(name), name, f"{name}.png", f"{name}.jpg"]
    if isinstance(image, str):
        names.insert(0, image)
    elif isinstance(image, dict) and not image.get("bytes") and image.get("path"):
        names.insert(0, image["path"])
    for base in (Path(media) / task.name, Path(media)):
        for file in names:
            if (base / file).is_file():
                return str(base / file)
    content = image.get("bytes") if isinstance(image, dict) else None
    path = Path(cache) / task.name / stored_name(name)
    if content is None:
        return str(Path(media) / task.name / names[0])
    if not path.is_file() or path.stat().st_size != len(content):
        write_bytes(path, content, durable=False)
    return str(path)


def column_of(table: Any, names: tuple[str, ...], what: str) -> str:
    """The first of these columns that a table has. ValueError names those it looked for and those there are."""
    found = next((name for name in names if name in table.column_names), None)
    if found is None:
        raise ValueError(f"{what}: no column {names[0]!r} (nor {', '.join(names[1:])}); it has {', '.join(table.column_names)}")
    return found


def read_qrels(table: Iterable[dict[str, Any]], query: str = "query-id", page: str = "corpus-id") -> dict[str, dict[str, float]]:
    """{query id: {corpus id: grade}} by ids as text; only grades above 0, the highest one when a pair repeats."""
    out: dict[str, dict[str, float]] = {}
    for at, row in enumerate(table):
        try:
            grade = float(row["score"])
        except (TypeError, ValueError):
            raise ValueError(f"qrels, row {at}: score should be a number, got {shown(row['score'])}") from None
        if grade > 0:
            pages = out.setdefault(id_text(row[query], f"qrels, row {at}, {query}"), {})
            name = id_text(row[page], f"qrels, row {at}, {page}")
            pages[name] = max(grade, pages.get(name, 0.0))
    return out


def _tables(task: Task, root: AnyPath | None, hub: bool) -> Iterator[tuple[str | None, Any, Any, dict[str, dict[str, float]]]]:
    """(language or None, queries, corpus, judgements): one of the plain layouts, or one for each language of mteb's."""
    for language in languages_of(root, task) or [None]:
        named = [f"{language}-{name}" if language else name for name in ("queries", "corpus", "qrels")]
        queries, corpus, qrels = (read_table(root, task, name, hub=hub) for name in named)
        ids = column_of(qrels, QUERY[:2], f"task {task.name}, qrels"), column_of(qrels, PAGE[:2], f"task {task.name}, qrels")
        column_of(qrels, ("score",), f"task {task.name}, qrels")
        yield language, queries, corpus, read_qrels(qrels, *ids)


def load_documents(
    task: Task, root: AnyPath | None, media: AnyPath, *, hub: bool = False, protocol: str = "v2", cache: AnyPath
) -> TaskData:
    """Text query -> page images.

    Options: `language` keeps the queries whose `language` column equals it; `mean_over: language` scores each language for itself.
    """
    from datasets import Image

    if old := unmended(root, task):
        mended = task.hub["dataset"]
        print(
            f"{task.name}: {old} may hold the labels that were published first, which are wrong; put {mended} into "
            f"{Path(old).with_name(mended.rsplit('/', 1)[-1])}",
            file=sys.stderr,
        )
    data, pool, ids = TaskData(task, grades=[], parts=[]), Pool(), []
    for language, queries, corpus, qrels in _tables(task, root, hub):
        page = column_of(corpus, PAGE, f"task {task.name}, corpus")
        column_of(corpus, ("image",), f"task {task.name}, corpus")
        if isinstance(corpus.features["image"], Image):
            corpus = corpus.cast_column("image", Image(decode=False))
        for at, row in enumerate(corpus.select_columns([page, "image"])):
            name = id_text(row[page], f"task {task.name}, corpus row {at}, {page}")
            if name in pool.index:
                if not data.parts:  # every language of mteb's layout repeats the pages
                    data.problems.add("duplicate_candidates", at, f"corpus row {at}: {name}")
                continue
            pool.add(name, {"text": task.target_prompt, "image": _page(name, row["image"], task, media, cache)}, name)
        ids += _add_queries(data, pool, task, queries, qrels, language)
    tell_repeated(data, ids, f"task {task.name}, queries")
    if not task.options.get("mean_over"):
        data.parts = None
    data.candidates, data.names = pool.items, pool.names
    return data


def _add_queries(data, pool, task, queries, qrels, language):
    """The queries of one table, those of the task's language where it has one. Returns their ids."""
    query, text = (column_of(queries, names, f"task {task.name}, queries") for names in (QUERY, TEXT))
    wanted, ids = task.options.get("language"), []
    if wanted and language is None:
        column_of(queries, ("language",), f"task {task.name}, queries")
    for row in queries:
        spoken = language or row.get("language")
        if wanted and spoken != wanted:
            continue
        at = len(data.queries)
        ids.append(id_text(row[query], f"task {task.name}, queries row {at}, {query}"))
        relevant = qrels.get(ids[-1], {})
        data.queries.append(asked(task.query_prompt, row[text], at, "query"))
        data.labels.append([pool.index.get(name, -1) for name in relevant])
        data.label_names.append(list(relevant))
        data.grades.append([plain_grade(grade) for grade in relevant.values()])
        data.parts.append(spoken or "")
    return ids
