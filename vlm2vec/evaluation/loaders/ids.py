"""Ids of queries and candidates: any type that data has them in, compared as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vlm2vec.evaluation.loaders.rows import Rows
from vlm2vec.files.documents import shown

# under which names tables keep them, the likeliest first
QUERY_IDS = ("_id", "id", "qid", "query_id", "query-id")
CANDIDATE_IDS = ("_id", "id", "doc_id", "document_id", "corpus-id", "corpus_id")
QRELS_QUERY = ("query_id", "query-id", "qid", "q_id", "id")
QRELS_CANDIDATE = ("corpus_id", "corpus-id", "doc_id", "document_id", "p_id")
QRELS_GRADE = ("label", "score")
QUERY_TEXTS = ("text", "query", "query_content", "short_query")


def id_text(value: Any, where: str) -> str:
    """An id as text: 7, 7.0 and "7" are one id, "07" is another, 0 is an id like any other.

    Raises: ValueError, beginning with `where`, for what is missing (null, an empty text) or is no id (a fraction, a list, true).
    """
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    missing = value is None or value == ""
    raise ValueError(f"{where}: {'no id' if missing else f'an id is a text or an integer, got {shown(value)}'}; give each row its own")


def pick(row: dict[str, Any], names: Iterable[str]) -> Any:
    """The first of these columns that the row has a value in, None where it has none. 0 is a value; null and "" are not."""
    for name in names:
        value = row.get(name)
        if value is not None and value != "":
            return value
    return None


def row_id(row: dict[str, Any], names: Sequence[str], where: str) -> str:
    """The id of a row under any of these names, as text. ValueError names the row and the names."""
    value = pick(row, names)
    if value is None:
        raise ValueError(f"{where}: no id; expected one under {', '.join(names)}")
    return id_text(value, where)


def grade_of(row: dict[str, Any], where: str) -> float:
    """The grade of a judgement, 1 where it tells none. ValueError for what is no finite number."""
    value = pick(row, QRELS_GRADE)
    try:
        grade = 1.0 if value is None else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: the grade should be a number, got {shown(value)}") from None
    if not abs(grade) < float("inf"):
        raise ValueError(f"{where}: the grade should be a finite number, got {shown(value)}")
    return grade


def read_judgements(table: Rows) -> dict[str, dict[str, float]]:
    """{query id: {candidate id: grade}} of a table of judgements: rows of grades above 0 alone, of a pair that stands twice the last one's.

    Raises: ValueError naming file and row: no id, or a grade that is no number.
    """
    out: dict[str, dict[str, float]] = {}
    for at, row in enumerate(table):
        where = table.where(at)
        query, candidate = row_id(row, QRELS_QUERY, where), row_id(row, QRELS_CANDIDATE, where)
        grade = grade_of(row, where)
        if grade > 0:
            out.setdefault(query, {})[candidate] = grade
    return out


def plain_grade(grade: float) -> int | float:
    """A grade as score files hold it: whole numbers as integers."""
    return int(grade) if grade == int(grade) else grade
