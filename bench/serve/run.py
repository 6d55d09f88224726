"""The server under load next to `encode` of the same inputs, and the index of 100,000 vectors.

    python -m bench serve [--parts server index] [--requests 2000] [--clients 32] [--rows 100000] [--width 1536] [--csv FILE]

server  2,000 requests of one to eight inputs, texts and pictures, from 32 connections of another process. Every answer is held to what
        `encode` gives of its input alone (1e-6), none may be lost; then throughput over offline `encode` of the same inputs, in rounds by
        turns, by wall clock and by processor time of the serving process, and its memory after a quarter as many requests and at the end.
        Clients have half of the cores, and the server and `encode` by turns the other half (Linux, two cores or more): the clock is
        what is held to the aim there. Elsewhere clients share the server's cores, and either of the two may reach it.
index   building, adding one file, removing one, opening, and searching for one and for 16 queries. Files are small and vectors drawn by
        their content, so that times are the index's own and not a model's.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from bench import models, tables
from bench.measure import child_environment
from bench.serve import indexing, traffic

SIZE = "tiny"


ROUNDS = 5  # of both ways in turns, since others use the machine too


def halves() -> tuple[set[int], set[int]] | None:
    """(cores of the server and of `encode`, cores of the clients), None where they cannot be told apart."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    half = len(cores) // 2
    return (set(cores[half:]), set(cores[:half])) if half else None


@contextlib.contextmanager
def on(cores: set[int] | None) -> Iterator[None]:
    """This thread, and threads and processes that it starts within the block, on these cores; None leaves them."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Served:
    """`vlm2vec serve` in a process of its own, on a free port."""

    def __init__(self, folder: str, *options: str):
        command = [sys.executable, "-m", "vlm2vec.cli", "serve", folder, "--port", "0", "--dtype", "float32", "--device", "cpu", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment(HF_HUB_OFFLINE="1")
        )
        line = self.process.stdout.readline()
        if "/v1/embeddings" not in line:
            self.process.kill()
            raise RuntimeError(f"the server did not start: {line}{self.process.stderr.read()[-2000:]}")
        self.port = int(line.split("/v1/embeddings")[0].rsplit(":", 1)[1])

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def cpu(self) -> float:
        """Processor seconds of all its threads so far."""
        with open(f"/proc/{self.process.pid}/stat", encoding="ascii") as f:
            parts = f.read().rpartition(")")[2].split()
        return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> float:
        """MiB now."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) / 1024


def in_turns(folder: str, count: int, clients: int) -> tuple[dict, traffic.Answered]:
    """Seconds and processor seconds of `encode` here and of a server, a share of the requests each in turns, and the server's memory."""
    import numpy as np

    from vlm2vec import VLM2Vec

    serving, asking = halves() or (None, None)
    with on(serving):  # torch's own threads stay where they began
        model = VLM2Vec.from_pretrained(folder, dtype="float32", device="cpu")
        made = traffic.pool(models.IMAGES)
        truth = np.stack([model.encode([x])[0] for x in made])
        served = Served(folder)
    wanted = traffic.requests(count, len(made))
    total = dict.fromkeys(("offline", "offline_cpu", "serve", "serve_cpu"), 0.0)
    told, share = traffic.Answered(), -(-count // ROUNDS)
    with served:
        with on(asking):
            traffic.send(served.port, made, wanted[: count // 4], truth, clients)
        total["before_mib"] = round(served.resident())
        for start in range(0, count, share):
            some = wanted[start : start + share]
            rows = [row for request in some for row in request]
            with on(serving):
                wall, cpu = time.perf_counter(), time.process_time()
                vectors = model.encode([made[row] for row in rows])
                total["offline"] += time.perf_counter() - wall
                total["offline_cpu"] += time.process_time() - cpu
            if not np.allclose(vectors, truth[rows], atol=1e-6):
                raise ValueError("encode of all inputs differs from encode of each alone")
            cpu = served.cpu()
            with on(asking):
                told.add(traffic.send(served.port, made, some, truth, clients))
            total["serve_cpu"] += served.cpu() - cpu
        total["serve"], total["after_mib"] = told.seconds, round(served.resident())
    return total, told


def too_slow(wall: float, cpu: float, apart: bool) -> list[str]:
    """What misses the aim of 0.8 of offline throughput.

    Args:
        wall, cpu: throughput over offline by the clock and by processor time. apart: whether clients had cores of their own.
    """
    by = {"the clock": wall} if apart else {"the clock": wall, "processor time": cpu}
    best = max(by, key=by.get)
    return [] if by[best] >= 0.8 else [f"serve: {by[best]:.2f} of offline throughput by {best}, aim 0.8"]


def server(args) -> tuple[list[dict], list[str]]:
    """Rows and missed aims of the part `server`."""
    with tempfile.TemporaryDirectory() as folder:
        models.write(SIZE, folder)
        total, told = in_turns(folder, args.requests, args.clients)
    waits = sorted(told.waits) or [0.0]
    about = {"part": "serve", "size": SIZE, "n": told.inputs}
    wall, cpu = total["offline"] / total["serve"], total["offline_cpu"] / total["serve_cpu"]
    rows = [
        {**about, "name": "encode offline", "ms_p50": round(1e3 * total["offline"]), "cpu_ms": round(1e3 * total["offline_cpu"])},
        {
            **about,
            "name": f"serve, {args.clients} clients",
            "ms_p50": round(1e3 * total["serve"]),
            "cpu_ms": round(1e3 * total["serve_cpu"]),
            "ratio": round(wall, 3),
            "cpu_ratio": round(cpu, 3),
            "ratio_to": "encode offline over it",
            "rss_mib": total["after_mib"] - total["before_mib"],
            "process_mib": total["after_mib"],
        },
    ]
    print(f"{args.requests} requests, {told.inputs} inputs, {told.tokens} tokens, {args.clients} clients")
    print(f"  encode offline   {total['offline']:7.2f} s  {total['offline_cpu']:7.2f} s of processor")
    print(f"  serve            {total['serve']:7.2f} s  {total['serve_cpu']:7.2f} s of processor")
    print(f"  throughput over offline: {wall:.3f} by wall clock, {cpu:.3f} by processor time")
    print(f"  answers: {told.requests} of {args.requests}, largest difference from encode alone {told.worst:.2g}")
    print(f"  a request took {waits[len(waits) // 2] * 1e3:.0f} ms at the median, {waits[len(waits) * 95 // 100] * 1e3:.0f} at 95 %")
    print(f"  resident memory: {total['before_mib']} MiB after a quarter as many requests, {total['after_mib']} at the end")
    missed = [f"serve: {told.errors[0]} ({len(told.errors)} such)"] if told.errors else []
    if told.worst > 1e-6:
        missed.append(f"serve: an answer differs by {told.worst:.2g} from encode alone, aim 1e-6")
    missed += too_slow(wall, cpu, halves() is not None)
    if total["after_mib"] > 1.1 * total["before_mib"] + 20:
        missed.append(f"serve: memory grew from {total['before_mib']} to {total['after_mib']} MiB")
    return rows, missed


PARTS = {"server": server, "index": indexing.part}


def main(argv=None) -> int:
    parser = tables.parser("serve", __doc__)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, nargs="+", default=[256, 1536])
    args = parser.parse_args(argv)
    rows, missed = [], []
    for part in args.parts:
        start = time.perf_counter()
        more, failed = PARTS[part](args)
        print(f"  ({time.perf_counter() - start:.0f} s)\n")
        rows += more
        missed += failed
    return tables.conclude(rows, missed, args.csv)


if __name__ == "__main__":
    sys.exit(main())
