"""A run beside a row of scores: task by task what was to be expected, and what explains the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm2vec.evaluation.reproduce.causes import fitting_causes
from vlm2vec.evaluation.reproduce.compare import HARMLESS, Difference, differences
from vlm2vec.evaluation.reproduce.expected import interval
from vlm2vec.evaluation.reproduce.rows import Row, Score
from vlm2vec.files import AnyPath, write_json, write_lines

EQUAL = 5e-7  # fractions that are nearer are the same number
MOST_WORDS = 4  # causes that a line of the terminal names


@dataclass(frozen=True)
class Verdict:
    """One task: `there` and `here` in fractions, the interval that was to be expected, and what explains the difference.

    Attributes:
        state: "equal", "expected" (within the interval), "outside" or "not compared" (another metric).
        differing: what is known to differ. causes: in words, the surest first; [] for equal scores.
    """

    task: str
    there: float
    here: float
    low: float
    high: float
    queries: int
    state: str
    differing: tuple[Difference, ...]
    causes: tuple[str, ...]

    @property
    def points(self) -> float:
        return 100 * (self.here - self.there)


def verdict_of(row: Row, name: str, score: Score, mine: dict[str, Any]) -> Verdict:
    """A task of a row beside its summary here (`runner.score_task`)."""
    here, queries = float(mine["score"]), score.queries or mine["num_queries"]
    low, high = interval(score.value, max(1, queries), rounding=max(score.rounding, row.noise / 100))
    known = differing(row, score, mine)
    state, causes = "equal", []
    if score.metric and score.metric != mine["metric"]:
        state, causes = "not compared", [f"{score.metric} there, {mine['metric']} here"]
    elif abs(here - score.value) > score.rounding + EQUAL:
        state, told = "expected" if low <= here <= high else "outside", score.run is not None
        causes = [str(difference) for difference in known if difference.kind not in HARMLESS]
        if state == "outside" or told:
            causes = fitting_causes(row.model, name, mine["modality"], 100 * (here - score.value), known, settings_told=told)
    return Verdict(name, score.value, here, low, high, queries, state, known, tuple(causes))


def differing(row: Row, score: Score, mine: dict[str, Any]) -> tuple[Difference, ...]:
    """What is known to differ between how a task was scored there and here."""
    run = mine.get("run") or {}
    if score.run:
        return tuple(differences(score.run, run))
    there: dict[str, Any] = {"settings": {k: v for k in ("protocol", "feeding", "frames") if (v := getattr(row, k)) is not None}}
    there["model"] = {"options": row.options}
    if score.queries:
        there["data"] = {"queries": score.queries}
    if run and row.prompt is None:
        there["settings"]["prompt"] = None
    return tuple(differences(there, run))


def compare_with(row: Row, rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Verdicts on the tasks that the row and this run share, in the run's order."""
    return [verdict_of(row, r["task"], row.scores[r["task"]], r) for r in rows if r["task"] in row.scores and r["score"] is not None]


def about(row: Row) -> str:
    """A row's name and where it is from."""
    return f"beside {row.name}" + (f" ({row.about})" if row.about else "")


def lines(row: Row, verdicts: Sequence[Verdict], *, missing: int = 0, causes: int = MOST_WORDS) -> list[str]:
    """The comparison for a terminal."""
    width = max([len(v.task) for v in verdicts] + [20])
    out = [about(row)]
    shared = shared_differences(verdicts)
    out += ["known to differ from it:", *(f"  {d}" for d in shared)] if shared else []
    out.append(f"{'task':<{width}} {'there':>7} {'here':>7} {'points':>7}  {'expected':>15} {'queries':>8}")
    for v in verdicts:
        span = f"{100 * v.low:.1f} to {100 * v.high:.1f}"
        mark = {"equal": "", "expected": "within", "outside": "OUTSIDE", "not compared": "another metric"}[v.state]
        numbers = f"{100 * v.there:>7.2f} {100 * v.here:>7.2f} {v.points:>+7.2f}"
        out.append(f"{v.task:<{width}} {numbers}  {span:>15} {v.queries:>8}  {mark}".rstrip())
        out += [f"{'':<{width}}   {why}" for why in v.causes[:causes]]
        if len(v.causes) > causes:
            out.append(f"{'':<{width}}   and {len(v.causes) - causes} more in reproduce.json")
        if v.state == "outside" and not v.causes:
            out.append(f"{'':<{width}}   no known cause fits")
    counted = {state: sum(v.state == state for v in verdicts) for state in ("equal", "expected", "outside", "not compared")}
    both = [v for v in verdicts if v.state != "not compared"]
    mean = sum(v.points for v in both) / len(both) if both else 0.0
    states = f"{counted['equal']} equal, {counted['expected']} within what is expected, {counted['outside']} outside"
    left = f"; {missing} tasks of the row were not run" if missing else ""
    out.append(f"{len(verdicts)} tasks compared: {states}; mean difference {mean:+.2f} points{left}")
    return out


def shared_differences(verdicts: Sequence[Verdict]) -> list[Difference]:
    """What differs in every compared task."""
    if not verdicts:
        return []
    return [d for d in verdicts[0].differing if all(d in v.differing for v in verdicts)]


def write_verdicts(output: AnyPath, row: Row, verdicts: Sequence[Verdict], missing: Sequence[str], means: Sequence[str] = ()) -> str:
    """OUTPUT/reproduce.json and reproduce.md; returns the path of the latter. `means` are the lines of `reproduce.means`."""
    from pathlib import Path

    told = [
        {
            "task": v.task,
            "there": v.there,
            "here": v.here,
            "expected": [v.low, v.high],
            "queries": v.queries,
            "state": v.state,
            "differing": [{"what": d.what, "kind": d.kind, "there": d.there, "here": d.here} for d in v.differing],
            "causes": list(v.causes),
        }
        for v in verdicts
    ]
    content = {"row": row.name, "model": row.model, "about": row.about, "tasks": told, "not_run": list(missing), "means": list(means)}
    write_json(Path(output) / "reproduce.json", content)
    path = Path(output) / "reproduce.md"
    compared = lines(row, verdicts, missing=len(missing), causes=100) if row.scores else [about(row)]
    write_lines(path, [f"# Beside {row.name}", "", "```", *compared, *means, "```"])
    return str(path)
