"""What was wrong with the data of a task: named, counted, and which rows it touched.

Rules by which an imperfect row is still scored (the summary states the counts):

| kind | rule |
|---|---|
| unreadable_candidate | an image or video that is missing, truncated or does not decode is ranked last, for every query |
| unreadable_query | the row counts as wrong (0 in every metric) |
| unreadable_positive | the right answer cannot be read, so the row counts as wrong |
| empty_candidates | nothing to rank: the row counts as wrong |
| absent_positive | no label is among the candidates: the row counts as wrong, ideal DCG still counts the label |
| empty_labels | recall 1, everything else 0 (the reference's rule) |
| duplicate_candidates | the first of equal candidates stands for all; the score is not affected |
| duplicate_queries | an id that stands twice: every row is scored, with the judgements of its id (the reference's rule) |
| dropped_candidates | a candidate without any text is left out (the reference's rule) |
| dropped_queries | a query without any text is left out (the reference's rule) |
| added_candidates | a right candidate that the corpus lacks is ranked beside it (the reference's rule for screens) |
| own_list_missing | a query has no list of its own, so that all queries of the task are ranked against everything (the reference's rule) |
| no_picture | a product none of whose pictures is there is fed as its text alone (what the reference does then is not published) |
| not_json | a tool's documentation that is not JSON is fed as it is |
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

HARMLESS = frozenset(
    {
        "duplicate_candidates",
        "duplicate_queries",
        "dropped_candidates",
        "dropped_queries",
        "added_candidates",
        "own_list_missing",
        "no_picture",
        "not_json",
    }
)
EXAMPLES = 5


class Problems:
    """Counter of bad rows. `add` is idempotent per (kind, row)."""

    def __init__(self):
        self.rows = defaultdict(set)
        self.examples = defaultdict(list)

    def add(self, kind: str, row: int | None, what: str = "") -> None:
        """Note that `row` (an int, or None when no single row is meant) has a problem; `what` names file or value."""
        if row in self.rows[kind] and row is not None:
            return
        self.rows[kind].add(row)
        if what and len(self.examples[kind]) < EXAMPLES and what not in self.examples[kind]:
            self.examples[kind].append(str(what))

    def summary(self) -> dict[str, Any]:
        """{"affected_rows": int, kind: {"rows": int, "examples": [str]}}; empty dict when nothing was wrong."""
        if not self.rows:
            return {}
        touched = set().union(*(rows for kind, rows in self.rows.items() if kind not in HARMLESS)) - {None}
        out = {"affected_rows": len(touched)}
        for kind in sorted(self.rows):
            out[kind] = {"rows": len(self.rows[kind]), "examples": self.examples[kind]}
        return out

    def __bool__(self) -> bool:
        return any(kind not in HARMLESS for kind in self.rows)

    def text(self) -> str:
        """One line for the terminal."""
        parts = []
        for kind in sorted(self.rows):
            sample = f" (e.g. {self.examples[kind][0]})" if self.examples[kind] else ""
            parts.append(f"{kind.replace('_', ' ')}: {len(self.rows[kind])} rows{sample}")
        return "; ".join(parts)
