"""Published rows: what models scored task by task, and the means that were printed. Percent, as data of this package."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from vlm2vec.evaluation.tasks import published
from vlm2vec.files.documents import read_yaml

HERE = Path(__file__).resolve().parent / "scores"
FILES = ("paper.yaml", "rerun.yaml", "v2_rerun.yaml")  # each tells its source and the protocol by which its rows were scored

# columns of the printed tables as `evaluation.score.aggregate.members` names them; MMEB-V2's Image is its 36 tasks
COLUMNS = {"Text": "text", "Agent": "agent", "Audio": "audio", "AVG": "V2", "Image": "image36", "Video": "video", "VisDoc": "visdoc"}


@dataclass(frozen=True)
class ScoreRow:
    """One model's scores out of one source.

    Attributes:
        name: "MODEL@SOURCE", the name under which `score_rows` has it. model, source: its parts.
        protocol: "v1", "v2" or "v3". feeding: how its inputs were worded, "official" or "wemm".
        scores: {task: percent}, by the task's main metric; tasks that the source leaves out are absent.
        means: {name: percent} that were printed where no task was (`evaluation.score.aggregate.members`).
    """

    name: str
    model: str
    source: str
    protocol: str
    feeding: str
    scores: dict[str, float]
    means: dict[str, float] = field(default_factory=dict)


@lru_cache(maxsize=1)
def score_rows() -> dict[str, ScoreRow]:
    """{name: ScoreRow} of all published rows. Do not change the dict.

    Example:
        >>> score_rows()["Omni-Embed-Nemotron-3B@v3-paper"].scores["ESC-50"]
        75.7
    """
    rows = []
    for file in FILES:
        content = read_yaml(HERE / file)
        source, protocol = content["source"], content["protocol"]
        for model, groups in content["models"].items():
            scores = {task: float(score) for group in groups.values() for task, score in group.items()}
            rows.append(ScoreRow(f"{model}@{source}", model, source, protocol, "official", scores))
    books = published()
    for column, model in books["columns"].items():
        protocol = "v1" if "V1 protocol" in model else "v2"
        model = model.split(" (")[0]
        scores = {task: float(cells[column]) for task, cells in books["models"].items() if column in cells}
        rows.append(ScoreRow(f"{model}@{protocol}-files", model, f"{protocol}-files", protocol, "official", scores))
    return {row.name: row for row in [*rows, *_rows_of_means()]}


def _rows_of_means() -> list[ScoreRow]:
    """Rows of WeMM-Embedding and of ViDoRe V3, of which means alone were printed; other models' means are those of their tasks."""
    printed, rows = printed_means(), []
    for model in (name for name in printed["v3"] if name.startswith("WeMM")):
        told = {COLUMNS.get(c, c): value for part in ("v3", "v3_subgroups", "v2") for c, value in printed[part].get(model, {}).items()}
        name = model.replace(" (", "-").rstrip(")")
        rows.append(ScoreRow(f"{name}@v3-wemm", name, "v3-wemm", "v3", "wemm", {}, told))
    for name, value in printed["vidore_v3"].items():
        rows.append(ScoreRow(f"{name}@vidore-v3", name, "vidore-v3", "v2", "official", {}, {"vidore_v3": value}))
    return rows


@lru_cache(maxsize=1)
def v3_columns() -> dict[str, str]:
    """{short name: name of the row} of the rows that stand beside MMEB-V3's tasks in lists."""
    return read_yaml(HERE / "paper.yaml")["columns"]


@lru_cache(maxsize=1)
def printed_means() -> dict[str, dict]:
    """{table: {model: {column: percent}}} of the printed means; the comments of scores/means.yaml say where each is from."""
    return read_yaml(HERE / "means.yaml")
