"""Pairs of one's own: ROOT/NAME/pairs.jsonl, a query and its answer a line, each query ranked among all answers.

    {"row": 7, "query": {"text": ..., "image": ...}, "target": {...}, "group": "p7"}      inputs of `model.encode`; media are paths
    {"row": 8, "error": "why it cannot be read"}

Right for a query are the answers of all lines with an equal query, and of all lines of its group where it has one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from vlm2vec.data.json_lines import read_json_lines
from vlm2vec.evaluation.tasks import Task
from vlm2vec.evaluation.tasks.task_data import Pool, TaskData, unreadable
from vlm2vec.files import AnyPath

FILE = "pairs.jsonl"


def load_pairs(task: Task, root: AnyPath, media: AnyPath, **options: Any) -> TaskData:
    """Reads one task; see the module. ValueError names the line that is no pair."""
    path = Path(root) / (task.path or task.name) / FILE
    data, pool = TaskData(task), Pool()
    right: dict[tuple[str, str], dict[int, None]] = defaultdict(dict)  # by query and by group, in the order of the lines
    asked = []
    for line, row in read_json_lines(path):
        if not isinstance(row, dict) or not ("error" in row or {"query", "target"} <= row.keys()):
            raise ValueError(f"{path}, line {line}: expected an object with query and target, got {str(row)[:60]}; write both")
        if "error" in row:
            data.queries.append(unreadable(f"row {row.get('row', line - 1)}: {row['error']}"))
            asked.append(None)
            continue
        target, query = (json.dumps(row[side], sort_keys=True) for side in ("target", "query"))
        at = pool.add(target, row["target"], _name(row["target"]))
        keys = [("query", query)] + ([("group", str(row["group"]))] if row.get("group") is not None else [])
        for key in keys:
            right[key][at] = None
        data.queries.append(row["query"])
        asked.append((at, keys))
    data.candidates, data.names = pool.items, pool.names
    for one in asked:
        own = {} if one is None else {one[0]: None} | {at: None for key in one[1] for at in right[key]}
        data.labels.append(list(own) or [-1])
        data.label_names.append([data.names[at] for at in own] or [""])
    return data


def pair_tasks(root: AnyPath) -> list[Task]:
    """The tasks of a folder of pairs, by name."""
    folders = sorted(path.parent for path in Path(root).glob(f"*/{FILE}"))
    return [Task(folder.name, loader="pairs", meta_task="held out", candidates="global") for folder in folders]


def _name(item: dict[str, Any]) -> str:
    visual = item.get("image") or item.get("video")
    visual = visual[0] if isinstance(visual, list) else visual
    return str(visual) if visual else item.get("text", "")
