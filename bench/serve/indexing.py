"""The index at its aim's size: 100,000 files, one added, one removed, opened and searched."""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from bench.measure import resident, restart_resident_peak

SEARCH_AIM_S = 0.2
OLD = 1_700_000_000  # when the files changed last


class Drawn:
    """Stands for a model: vectors are drawn by the number in a file."""

    prompts: dict = {}
    source = "drawn"

    def __init__(self, rows: int, width: int):
        self.embedding_dim = width
        table = np.random.default_rng(0).standard_normal((rows, width), dtype=np.float32)
        self.table = table / np.linalg.norm(table, axis=1, keepdims=True)

    def identity(self) -> dict:
        return {"family": "drawn", "weights": f"{self.table.shape}", "dtype": "torch.float32"}

    def embed(self, inputs: list[dict]):
        """For `Index.update(encode=)`."""
        import torch

        numbers = [int(Path(x["image"]).read_bytes()) for x in inputs]
        return torch.from_numpy(self.table[numbers]), {}


def clocked(run) -> tuple[object, float, float]:
    """(result, seconds, processor seconds)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def one_width(rows: int, width: int) -> list[dict]:
    """A row for each step. Raises ValueError where the index finds anything but what exhaustive float64 search finds."""
    from vlm2vec.data.index import Index

    model = Drawn(rows + 1, width)
    steps: list[tuple[str, float, float]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "files"
        for i in range(rows):
            name = folder / f"{i // 1000:04d}" / f"{i:07d}.png"
            if i % 1000 == 0:
                name.parent.mkdir(parents=True)
            name.write_text(str(i))
            os.utime(name, (OLD, OLD))
        before = restart_resident_peak()
        index = Index(Path(place) / "index", model=model)

        def step(name, run):
            result, wall, cpu = clocked(run)
            steps.append((name, wall, cpu))
            return result

        def update(folder=None):
            return str(index.update(folder, encode=model.embed, progress=False))

        told = [step("build", lambda: update(folder))]
        build_peak = resident("VmHWM") - before
        (folder / "0000/new.png").write_text(str(rows))
        os.utime(folder / "0000/new.png", (OLD, OLD))
        told.append(step("one added", update))
        (folder / "0000/0000005.png").unlink()
        told.append(step("one removed", update))
        told.append(step("nothing to do", update))
        disk = sum(file.stat().st_size for file in (Path(place) / "index").iterdir()) >> 20
        wanted = [f"{rows} added, 0 changed, 0 removed, 0 kept", f"1 added, 0 changed, 0 removed, {rows} kept"]
        wanted += [f"0 added, 0 changed, 1 removed, {rows} kept", f"0 added, 0 changed, 0 removed, {rows} kept"]
        if told != wanted:
            raise ValueError(f"the index counts {told}")
        del index
        before = restart_resident_peak()
        index = step("open", lambda: Index.open(Path(place) / "index"))
        queries = model.table[:16] + 0.3 * np.random.default_rng(1).standard_normal((16, width), dtype=np.float32) / width**0.5
        step("first query", lambda: index.search_vectors(queries[:1], 10))
        for name, some in (("search, one query", queries[:1]), ("search, 16 queries", queries)):
            for _ in range(5):
                found = step(name, partial(index.search_vectors, some, 10))
        opened = resident("VmRSS") - before
        scores = queries.astype(np.float64) @ model.table.T.astype(np.float64)
        scores[:, 5] = -np.inf
        for query, hits in zip(scores, found):
            best = np.argsort(-query)[:10]
            keys = ["0000/new.png" if i == rows else f"{i // 1000:04d}/{i:07d}.png" for i in best]
            if [hit.key for hit in hits] != keys or abs(np.array([hit.score for hit in hits]) - query[best]).max() > 1e-6:
                raise ValueError("the index finds something else than an exhaustive search in float64")
    best: dict[str, tuple[float, float]] = {}
    for name, wall, cpu in steps:
        best[name] = min(best.get(name, (wall, cpu)), (wall, cpu))
    about = {"part": "index", "n": rows, "d": width}
    made = [{**about, "name": name, "ms_min": round(1e3 * wall, 2), "cpu_ms": round(1e3 * cpu, 2)} for name, (wall, cpu) in best.items()]
    made[0]["rss_mib"] = round(build_peak)
    made[-1]["rss_mib"] = round(opened)
    made[-1]["value"], made[-1]["unit"] = disk, "MiB on disk"
    return made


def part(args) -> tuple[list[dict], list[str]]:
    """Rows and missed aims of the part `index`."""
    rows, missed = [], []
    for width in args.width:
        made = one_width(args.rows, width)
        print(f"{args.rows} vectors of {width} ({made[-1]['value']} MiB on disk)")
        for row in made:
            print(f"  {row['name']:<20}{row['ms_min']:>10.1f} ms{row['cpu_ms']:>10.1f} ms of processor" + told_memory(row))
            if row["name"] == "search, one query" and row["cpu_ms"] > 1e3 * SEARCH_AIM_S:
                missed.append(f"index: a query takes {row['cpu_ms']:.0f} ms at width {width}, aim {SEARCH_AIM_S} s")
        rows += made
    return rows, missed


def told_memory(row: dict) -> str:
    return f"  {row['rss_mib']:>5} MiB more resident" if "rss_mib" in row else ""
