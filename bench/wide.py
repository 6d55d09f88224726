"""Memory of an evaluation beside its inputs: pools of hundreds of thousands of candidates, and texts of a million characters.

    python -m bench wide [--tasks tools products texts long] [--scale 1] [--csv FILE]

Each task of MMEB-V3 is written in its layout and size (--scale 0.1: a tenth of its candidates), read, encoded by a stand-in whose
vectors (64 wide) cost nothing, stored and ranked, in a process of its own: what is left is the evaluation's own memory and processor
time. Peers: "files", this project, which reads an input when it is looked at; "held", the same with every input made at once and
kept, as a list of dictionaries is. Their scores must agree before a number is shown.

    tools       37,292 tools of 1,200 characters, 100 queries           (toolde/web)
    products    123,000 products, each with a picture of its own        (MCMR)
    texts       413,932 passages of 900 characters                      (BRIGHT leetcode)
    long        355 passages of up to 1,870,000 characters              (LongEmbed narrativeqa)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import measure, tables

SIZES = {"tools": 37_292, "products": 123_000, "texts": 413_932, "long": 355}
NAMES = {"tools": "toolde/web/apibank", "products": "MCMR", "texts": "text/BRIGHT/leetcode", "long": "text/LongEmbed/narrativeqa"}
PEERS = ("files", "held")
WIDTH, QUERIES = 64, 100


class StandIn:
    """Vectors out of a hash of text and picture names: no model's time, no model's memory."""

    modalities = ("text", "image", "video")

    def identity(self) -> dict[str, Any]:
        return {"stand_in": WIDTH}

    def preprocess(self, inputs: list) -> None:
        """Nothing can be wrong with them."""

    def encode(self, inputs: list[dict[str, Any]], **_: Any):
        import numpy as np
        import torch

        digests = [hashlib.blake2b(repr((x.get("text"), x.get("image"))).encode(), digest_size=WIDTH).digest() for x in inputs]
        rows = np.frombuffer(b"".join(digests), dtype=np.int8).reshape(len(inputs), WIDTH)
        return torch.nn.functional.normalize(torch.from_numpy(rows.astype(np.float32)), dim=1)


def write(task: str, root: Path, count: int) -> None:
    """One task's files, `count` candidates of it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(path: str, **columns) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), root / path)

    def words(seed: int, length: int) -> str:
        return hashlib.shake_256(str(seed).encode()).hexdigest(length // 2)

    if task == "tools":
        base = "tool-tasks/ToolDe-{}/web"
        table(
            base.format("Candidates") + "/tools-00000-of-00001.parquet",
            id=[f"t{i}" for i in range(count)],
            documentation=[json.dumps({"name": f"n{i}", "description": words(i, 1200)}) for i in range(count)],
        )
        table(
            base.format("Queries") + "/apibank/queries-00000-of-00001.parquet",
            id=[f"q{i}" for i in range(QUERIES)],
            query=[f"query {i}" for i in range(QUERIES)],
            instruction=["Find a tool."] * QUERIES,
            labels=[json.dumps([{"id": f"t{i}"}]) for i in range(QUERIES)],
        )
    elif task == "texts":
        base = "text-tasks/BRIGHT/{}/leetcode-00000-of-00001.parquet"
        table(base.format("documents"), id=[f"d{i}" for i in range(count)], content=[words(i, 900) for i in range(count)])
        ids = [f"q{i}" for i in range(QUERIES)]
        table(base.format("examples"), id=ids, query=ids, gold_ids=[[f"d{i}"] for i in range(QUERIES)])
    elif task == "long":
        base = root / "text-tasks/LongEmbed/narrativeqa"
        lines(base / "corpus.jsonl", ({"_id": i, "text": words(i, 1_870_000 // (1 + i % 5))} for i in range(count)))
        lines(base / "queries.jsonl", ({"_id": i, "text": f"query {i}"} for i in range(QUERIES)))
        lines(base / "qrels.jsonl", ({"query_id": i, "corpus_id": i % count} for i in range(QUERIES)))
    else:
        base = root / "image-tasks/MCMR"
        products = (
            {"candidate_id": i, "title": f"product {i}", "description": [words(i, 400)], "images": [{"url": f"x/{i}.png"}]}
            for i in range(count)
        )
        lines(base / "candidates.jsonl", products)
        lines(base / "query.jsonl", ({"qid": i, "query": f"query {i}", "pos_ids": [i]} for i in range(QUERIES)))
        (base / "images").mkdir()
        for i in range(count):
            (base / "images" / f"{i}.png").write_bytes(b"picture %d" % i)  # nothing opens it


def lines(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def measured(peer: str, task: str, folder: str) -> dict[str, Any]:
    """One peer, in this process."""
    import datasets  # noqa: F401 (seconds and memory of an import, before the clock)

    from vlm2vec.evaluation import runner
    from vlm2vec.evaluation.tasks import load_tasks
    from vlm2vec.evaluation.tasks.task_data import whole

    if peer == "held":
        read = runner.load_task

        def held(*arguments: Any, **options: Any):
            data = read(*arguments, **options)
            data.queries, data.candidates = [dict(whole(x)) for x in data.queries], [dict(whole(x)) for x in data.candidates]
            return data

        runner.load_task = held
    with tempfile.TemporaryDirectory() as warm:  # what a first run imports is nobody's inputs
        write("long", Path(warm), 1)
        runner.run_tasks(
            StandIn(), [load_tasks("v3")[NAMES["long"]]], warm, warm, f"{warm}/out", options=runner.Options(progress=False, protocol="v3")
        )
    before, start = measure.restart_resident_peak(), time.process_time()
    with tempfile.TemporaryDirectory() as out:
        options = runner.Options(progress=False, protocol="v3", device="cpu")
        (row,) = runner.run_tasks(StandIn(), [load_tasks("v3")[NAMES[task]]], folder, folder, out, options=options)
        cpu = time.process_time() - start
        peak = measure.resident("VmHWM")
        store = sum(path.stat().st_size for path in Path(out).rglob("shard-*")) / measure.MIB
    return {"before": before, "peak": peak, "cpu": cpu, "store": store, "candidates": row["num_candidates"], "scores": row["metrics"]}


CHILDREN = {"measured": measured}


def run(task: str, scale: float) -> list[dict[str, Any]]:
    """The rows of one task."""
    count = max(QUERIES, round(SIZES[task] * scale)) if task != "long" else max(1, round(SIZES[task] * scale))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write(task, Path(folder), count)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.suffix != ".png") / measure.MIB
        variables = {**measure.BLOCKS_GIVEN_BACK, "HF_DATASETS_CACHE": f"{folder}/cache"}
        found = {peer: measure.in_child("bench.wide", "measured", peer, task, folder, **variables) for peer in PEERS}
    if found["files"]["scores"] != found["held"]["scores"]:
        raise RuntimeError(f"{task}: scores differ between the peers, {found['files']['scores']} and {found['held']['scores']}")
    for peer, told in found.items():
        rss = told["peak"] - told["before"]
        row = {
            "part": "wide",
            "name": peer,
            "size": task,
            "m": told["candidates"],
            "rss_mib": round(rss),
            "process_mib": round(told["peak"]),
        }
        rows.append({**row, "cpu_ms": round(1e3 * told["cpu"]), "value": round(size), "unit": "MiB of tables"})
        print(
            f"{task:<10}{peer:<8}{told['candidates']:>9,} candidates, tables {size:>7,.0f} MiB   resident growth {rss:>7,.0f} MiB"
            f"   processor {told['cpu']:>6.1f} s",
            flush=True,
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench wide", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(SIZES), default=tuple(SIZES))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--csv")
    options = parser.parse_args(argv)
    rows = [row for task in options.tasks for row in run(task, options.scale)]
    return tables.conclude(rows, [], options.csv)
