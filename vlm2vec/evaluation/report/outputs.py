"""Files of one task: what the reference writes where that is not a pickle, and ours beside it.

OUTPUT/
  {dataset}_score.json            V1 (image tasks): {"acc", "num_correct", "num_pred"}
  {dataset}_pred.txt              V1: the chosen candidate of each query, one (text, path) pair a line
  {dataset}_top.jsonl             ours: query, label and the best candidates with scores, for reports
  {image|video|visdoc}/{dataset}_score.json, _pred.jsonl, _info.jsonl      V2 (image tasks: _info under --protocol v2)
  {text|tool|gui|memory|audio}/{dataset}_...                               V3, by whole names: text/text/BRIGHT/aops_score.json, and the
                                  scores again as text/aops_score.json, where the reference's report looks for them

The reference's `_qry` and `_tgt` files are pickles: neither written nor read. The vectors are in the embedding store.
The reference skips a data set whose `_score.json` is there, so its tools run on this folder without the pickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm2vec.files import AnyPath, write_json, write_lines

if TYPE_CHECKING:
    import torch

    from vlm2vec.evaluation.tasks.task_data import TaskData


MOST_TEXT = 2000  # characters of a text in files for people: passages of a million would be written for every query that finds them


def shown_text(item: dict[str, Any]) -> str:
    """An input's text as files for people have it, cut where it is long."""
    text = item.get("text") or ""
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}..."


def _side(item):
    video = item.get("video")
    frames = {"video": [str(f) for f in video] if isinstance(video, (list, tuple)) else str(video)} if video else {}
    image = item.get("image")
    return {"text": shown_text(item), "image": str(image) if isinstance(image, (str, os.PathLike)) else "", **frames}


def top_rows(
    data: TaskData, scores: torch.Tensor, indices: torch.Tensor, ranks: Sequence[int | None], depth: int
) -> Iterator[dict[str, Any]]:
    """One dict per query: {"row", "query", "labels", "rank", "top": [{"text", "image", "name", "score", "correct"}]}.

    `rank` is the 1-based rank of the best label among those looked at, None when it is not there.
    """
    known: dict[int, dict[str, Any]] = {}  # a candidate may be of use to many queries, and is read from its file once

    def side(c):
        if c not in known:
            known[c] = _side(data.candidates[c])
        return known[c]

    for i, query in enumerate(data.queries):
        right = set(data.labels[i]) - {-1}
        top = []
        for score, c in zip(scores[i, :depth].tolist(), indices[i, :depth].tolist()):
            if c >= 0:
                name = data.names[c]
                top.append({**side(c), "name": name, "score": round(score, 6), "correct": c in right})
        labels = [
            {**(side(c) if c >= 0 else {"text": "", "image": ""}), "name": name} for c, name in zip(data.labels[i], data.label_names[i])
        ]
        yield {"row": i, "query": _side(query), "labels": labels, "rank": ranks[i], "top": top}


def write_v1(
    folder: AnyPath, data: TaskData, indices: torch.Tensor, correct: Sequence[bool], run: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`{dataset}_score.json` and `{dataset}_pred.txt` as V1 writes them. Returns the score object.

    Args:
        run: what the score was made with (`reproduce.record`), which stands beside it under "run".
    """
    name = data.task.name
    lines = []
    for best in indices[:, 0].tolist():
        item = data.candidates[best] if best >= 0 else {}
        lines.append(repr((item.get("text") or "", _relative(item.get("image"), data))))
    write_lines(Path(folder) / f"{name}_pred.txt", lines, durable=False)
    count = int(sum(correct))
    score = {
        "acc": count / len(correct) if len(correct) else 0.0,
        "num_correct": count,
        "num_pred": len(correct),
        **({"run": run} if run else {}),
    }
    write_json(Path(folder) / f"{name}_score.json", score, durable=False)
    return score


def _relative(path, data):
    if not isinstance(path, (str, os.PathLike)):  # several pictures, or none
        return ""
    return os.path.relpath(path, data.media) if path and data.media else path


def write_v2(
    folder: AnyPath, data: TaskData, indices: torch.Tensor, metrics: dict[str, float], info: bool = True, run: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`_score.json`, `_pred.jsonl`, `_info.jsonl` in OUTPUT/{modality} as V2 writes them; predictions cut at our depth.

    Args:
        info: False leaves `_info.jsonl` out: with a thousand local candidates a query it is the largest file by far.
        run: as for `write_v1`.
    """
    folder, name = Path(folder) / data.task.modality, data.task.name

    def predictions():
        for i, row in enumerate(indices.tolist()):
            grades = data.grades[i] if data.grades is not None else None
            yield json.dumps(
                {"prediction": [data.names[c] for c in row if c >= 0], "label": data.label_names[i], "rel_scores": grades},
                ensure_ascii=False,
            )

    def infos():
        for i in range(len(data.queries)):
            names = data.label_names[i]
            cand = [data.names[c] for c in data.local[i]] if data.local is not None else names
            info = {"cand_names": cand, "label_name": names[0] if len(names) == 1 else names}
            if data.grades is not None:
                info["rel_scores"] = data.grades[i]
            yield json.dumps(info, ensure_ascii=False)

    write_lines(folder / f"{name}_pred.jsonl", predictions(), durable=False)
    if info:
        write_lines(folder / f"{name}_info.jsonl", infos(), durable=False)
    score = {**metrics, "num_pred": len(data.queries), "num_data": len(data.queries), **({"run": run} if run else {})}
    write_json(folder / f"{name}_score.json", score, durable=False)
    if "/" in name:  # the reference's report looks for its own name of the task
        write_json(folder / f"{data.task.report_name}_score.json", score, durable=False)
    return score
