"""Published rows and own score files: scores by task, and how they were made, as far as anybody said."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm2vec.evaluation.tasks import known_tasks
from vlm2vec.evaluation.tasks.score_rows import HERE, ScoreRow, score_rows
from vlm2vec.files import AnyPath
from vlm2vec.files.documents import kind, parse_json, read_text, read_yaml, shown

SUFFIX = "_score.json"


@dataclass(frozen=True)
class Score:
    """One task's score.

    Attributes:
        value: a fraction. rounding: by which it may have been rounded. queries: of the task; None where nobody said.
        metric: its name; None where the file does not say.
        run: what it was made with (`reproduce.record`); None for published rows and for score files from before 2.0.
    """

    value: float
    rounding: float = 0.0
    queries: int | None = None
    metric: str | None = None
    run: dict[str, Any] | None = None


@dataclass(frozen=True)
class Row:
    """A model's scores and their settings.

    Attributes:
        name: under which it was asked for. model: whose scores they are.
        protocol, feeding, frames, prompt, options: what it was made with, None or {} where nobody said; options are family options.
        frames_everywhere: the frames hold for tasks too that take all stored ones. dtype: of the weights.
        means: {name: fraction} that were printed, by the names of `score.aggregate.members`.
        noise: points by which two runs of it were apart on one task. about: where it is from.
    """

    name: str
    model: str
    scores: dict[str, Score]
    protocol: str | None = None
    feeding: str | None = None
    frames: str | None = None
    prompt: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    frames_everywhere: bool = False
    dtype: str | None = None
    noise: float = 0.0
    about: str = ""
    means: dict[str, float] = field(default_factory=dict)

    @property
    def has_runs(self) -> bool:
        """Whether it says of a task all that its score was made with."""
        return any(score.run for score in self.scores.values())


def find_row(name: AnyPath) -> Row:
    """The row of a published name (MODEL@SOURCE), or of a file that `vlm2vec eval` wrote (summary.json, tasks/NAME.json, NAME_score.json).

    Raises:
        ValueError: no such row or file; says which rows have similar names.
    """
    text = os.fspath(name)
    if os.path.exists(text):
        return read_scores(text)
    rows = score_rows()
    if text in rows:
        return published_row(rows[text])
    near = difflib.get_close_matches(text, rows, n=3, cutoff=0.3) or sorted(rows)[:3]
    raise ValueError(f"no published row or score file {shown(text)}; rows are called MODEL@SOURCE, such as {', '.join(near)}")


@lru_cache(maxsize=1)
def _sources() -> dict[str, Any]:
    return read_yaml(HERE / "settings.yaml")["sources"]


def published_row(row: ScoreRow) -> Row:
    """A published row with the settings of its source and model."""
    source = dict(_sources().get(row.source, {}))
    for part, said in source.pop("models", {}).items():
        if part in row.model.lower():
            source = {**source, **said}
            break
    tasks = known_tasks()
    scores = {}
    for name, percent in row.scores.items():
        task = tasks.get(name)
        scores[name] = Score(percent / 100, _rounding(percent), task.queries if task else None, task.metric if task else None)
    source = {"protocol": row.protocol, "feeding": row.feeding, **source}
    return Row(row.name, row.model, scores, **source, means={name: percent / 100 for name, percent in row.means.items()})


def _rounding(percent: float) -> float:
    """Half of the last digit of a printed percentage, as a fraction: one digit behind the point, or two where two are there."""
    return 0.0005 if round(percent, 1) == percent else 0.00005


def read_scores(path: AnyPath) -> Row:
    """The scores of a file that `vlm2vec eval` wrote, or of an output folder. Files without settings are read; they say less.

    Raises:
        ValueError: names the file that holds no scores.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "summary.json"
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a score file, an object, got {kind(content)}")
    if isinstance(content.get("tasks"), list):
        rows = [row for row in content["tasks"] if isinstance(row, dict)]
    elif "task" in content and "score" in content:
        rows = [content]
    else:
        rows = [_reference_row(path, content)]
    scores = {}
    for row in rows:
        value = row.get("score")
        if value is None and row.get("unsupported"):
            continue
        if not isinstance(row.get("task"), str) or isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{path}: expected a task and its score from 0 to 1, got {shown(row.get('task'))}, {shown(value)}")
        run = row.get("run") if isinstance(row.get("run"), dict) else None
        scores[row["task"]] = Score(float(value), 0.0, row.get("num_queries"), row.get("metric"), run)
    if not scores:
        raise ValueError(f"{path}: no scores in it; expected summary.json, tasks/NAME.json or NAME{SUFFIX} of vlm2vec eval")
    return _own_row(str(path), str(content.get("model") or ""), content.get("protocol"), scores)


def _reference_row(path: Path, content: dict) -> dict[str, Any]:
    """A `NAME_score.json` of V1 or V2 as a row; the metric is the task's own, hit@1 for an unknown one."""
    name, run = path.name.removesuffix(SUFFIX), content.get("run") if isinstance(content.get("run"), dict) else None
    name = ((run or {}).get("task") or {}).get("name") or name
    if "acc" in content:
        return {"task": name, "score": content["acc"], "metric": "hit@1", "num_queries": content.get("num_pred"), "run": run}
    task = known_tasks().get(name) or next((t for t in known_tasks().values() if t.report_name == name), None)
    metric = ((run or {}).get("task") or {}).get("metric") or (task.metric if task else "hit@1")
    if metric not in content:
        raise ValueError(f"{path}: no {metric} in it; expected a score file of vlm2vec eval or of the reference")
    score = {"task": task.name if task and not run else name, "score": content[metric], "metric": metric}
    return {**score, "num_queries": content.get("num_pred"), "run": run}


def _own_row(name: str, model: str, protocol: str | None, scores: dict[str, Score]) -> Row:
    """A row of own scores; a setting holds for it where all its tasks agree."""
    runs = [score.run for score in scores.values() if score.run]
    if not runs:
        return Row(name, model, scores, protocol)
    settings = {
        key: runs[0]["settings"][key]
        for key in ("protocol", "feeding", "frames", "frames_everywhere", "prompt")
        if key in runs[0]["settings"]
    }
    settings = {key: value for key, value in settings.items() if all(run["settings"].get(key) == value for run in runs)}
    options = dict((runs[0]["model"].get("options")) or {})
    options = {key: value for key, value in options.items() if all((run["model"].get("options") or {}).get(key) == value for run in runs)}
    return Row(
        name,
        model or runs[0]["model"].get("name", ""),
        scores,
        **settings,
        options={**_without_reading(options), **(runs[0]["settings"].get("pictures") or {})},
        dtype=str(runs[0]["model"].get("dtype") or "").removeprefix("torch.") or None,
    )


def _without_reading(options: dict[str, Any]) -> dict[str, Any]:
    """Family options but for those that task and protocol decide; a limit of texts that was in force holds for them all."""
    from vlm2vec.backbones.processing import READING

    kept = {"text_max_length"} if options.get("text_max_length") is not None else set()
    return {key: value for key, value in options.items() if key not in READING or key in kept}
