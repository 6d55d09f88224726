"""Exports: predictions as parquet for `datasets`, candidate vectors as a FAISS index, scores as a leaderboard file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm2vec.evaluation.report.outputs import shown_text
from vlm2vec.evaluation.tasks import load_tasks
from vlm2vec.files import AnyPath, replacing, write_json, write_lines, write_table

if TYPE_CHECKING:
    import torch

    from vlm2vec.evaluation.tasks.task_data import TaskData


QUERIES_AT_ONCE = 2048  # of a prediction file's rows: each holds a hundred texts


def write_predictions(
    path: AnyPath, data: TaskData, scores: torch.Tensor, indices: torch.Tensor, ranks: Sequence[int | None], depth: int
) -> None:
    """One parquet file of one task, the same columns for every task: load_dataset("parquet", data_files="OUT/predictions/*").

    Columns: task, row, query_text, query_image, labels [text], predictions [text], prediction_texts [text],
    prediction_images [text], scores [float32], rank (1-based, null when no label was ranked), hit (bool: rank 1). Long texts are cut.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, texts = pa.string(), pa.list_(pa.string())
    columns = {
        "task": text,
        "row": pa.int64(),
        "query_text": text,
        "query_image": text,
        "labels": texts,
        "predictions": texts,
        "prediction_texts": texts,
        "prediction_images": texts,
        "scores": pa.list_(pa.float32()),
        "rank": pa.int64(),
        "hit": pa.bool_(),
    }
    schema = pa.schema(list(columns.items()))
    known: dict[int, tuple[str, str]] = {}  # what candidates show, each made once; most are found by no query

    def side(c):
        if c not in known:
            known[c] = (shown_text(data.candidates[c]), _path(data.candidates[c]))
        return known[c]

    def table(first, last):
        found = {name: [] for name in columns}
        for i in range(first, last):
            best = [c for c in indices[i, :depth].tolist() if c >= 0]
            row = {
                "task": data.task.name,
                "row": i,
                "query_text": shown_text(data.queries[i]),
                "query_image": _path(data.queries[i]),
                "labels": data.label_names[i],
                "predictions": [data.names[c] for c in best],
                "prediction_texts": [side(c)[0] for c in best],
                "prediction_images": [side(c)[1] for c in best],
                "scores": scores[i, : len(best)].tolist(),
                "rank": ranks[i],
                "hit": ranks[i] == 1,
            }
            for name, value in row.items():
                found[name].append(value)
        return pa.table(found, schema=schema)

    count = len(data.queries)
    if count <= QUERIES_AT_ONCE:
        write_table(path, table(0, count), durable=False)
        return
    with replacing(path, durable=False) as part, pq.ParquetWriter(part, schema, compression="zstd") as writer:
        for first in range(0, count, QUERIES_AT_ONCE):
            writer.write_table(table(first, min(first + QUERIES_AT_ONCE, count)))


def _path(item):
    image = item.get("image")
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    video = item.get("video")
    return str(video[0]) if isinstance(video, list) and video else str(video) if isinstance(video, str) else ""


def write_faiss(folder: AnyPath, name: str, vectors: torch.Tensor, names: Sequence[str]) -> None:
    """FOLDER/{name}.index (exact inner product) and FOLDER/{name}.names.jsonl, line i naming vector i.

    Raises: ValueError when faiss is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise ValueError("--faiss needs the faiss package; pip install faiss-cpu") from None
    folder = Path(folder)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors.cpu().float().contiguous().numpy())
    with replacing(folder / f"{name}.index") as part:
        faiss.write_index(index, str(part))
    write_lines(folder / f"{name}.names.jsonl", (json.dumps(n, ensure_ascii=False) for n in names))


def leaderboard(rows: list[dict[str, Any]], model_name: str, **metadata: Any) -> dict[str, Any]:
    """The public leaderboard's one JSON per model.

    Args: rows, per-task summaries; metadata: model_backbone, model_size, url, ... as far as known.
    Returns: {"metadata": .., "metrics": {"image": {dataset: score object}, "video": .., "visdoc": ..}}; a published task
        that was not run is the string FILE_N/A, a modality without any DIR_N/A. Own tasks are left out. Rows of MMEB-V3 give all of
        its modalities.
    """
    known = {
        "model_name": model_name,
        "model_backbone": None,
        "model_size": None,
        "embedding_dimension": None,
        "max_length_tokens": None,
        "model_release_date": None,
        "data_source": "Self-Reported",
        "url": None,
        "report_generated_date": date.today().isoformat(),
    }
    done = {row["task"]: row for row in rows if row["score"] is not None}
    table = load_tasks("v3" if any(row.get("protocol") == "v3" for row in rows) else "v2")
    metrics = {}
    for modality in dict.fromkeys(task.modality for task in table.values()):
        part = {}
        for task in table.values():
            if task.modality != modality:
                continue
            row = done.get(task.name)
            part[task.report_name] = (
                {**row["metrics"], "num_pred": row["num_queries"], "num_data": row["num_queries"]} if row else "FILE_N/A"
            )
        metrics[modality] = part if any(name in done for name in (t.name for t in table.values() if t.modality == modality)) else "DIR_N/A"
    return {"metadata": {**known, **metadata}, "metrics": metrics}


def write_leaderboard(output: AnyPath, rows: list[dict[str, Any]], model_name: str, **metadata: Any) -> Path:
    """OUTPUT/{model_name}.json, the file that the leaderboard takes."""
    path = Path(output) / f"{model_name.replace('/', '_')}.json"
    write_json(path, leaderboard(rows, model_name, **metadata))
    return path
