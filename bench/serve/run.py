"""The server under load next to `encode` of the same inputs, and the index of 100,000 vectors.

    python -m bench serve [--parts server index] [--requests 2000] [--clients 32] [--rows 100000] [--width 1536] [--csv FILE]

server  2,000 requests of one to eight inputs, texts and pictures, from 32 connections of another process. Every answer is held to what
        `encode` gives of its input alone (1e-6), none may be lost; then throughput over offline `encode` of the same list, by wall clock
        and by processor time of the serving process, and resident memory after a quarter of the requests and at the end.
        Clients share the processor with the server: where there are few cores, processor time is the fair number.
index   building, adding one file, removing one, opening, and searching for one and for 16 queries. Files are small and vectors drawn by
        their content, so that times are the index's own and not a model's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

from bench import models, tables
from bench.measure import child_environment, process_peak_mib, timed
from bench.serve import indexing, traffic

SIZE = "tiny"


def offline(folder: str, count: int, passes: int = 1) -> dict:
    """Seconds of `encode` for the inputs of all requests, in this process, and the truth of each of the pool."""
    import numpy as np

    from vlm2vec import VLM2Vec

    model = VLM2Vec.from_pretrained(folder, dtype="float32", device="cpu")
    made = traffic.pool(models.IMAGES)
    alone = np.stack([model.encode([x])[0] for x in made])
    np.save(os.path.join(folder, "truth.npy"), alone)
    rows = [row for request in traffic.requests(count, len(made)) for row in request]
    inputs = [made[row] for row in rows]
    model.encode(inputs[:64])
    vectors, times = timed(lambda: model.encode(inputs), passes)
    if not np.allclose(vectors, alone[rows], atol=1e-6):
        raise ValueError("encode of all inputs differs from encode of each alone")
    return {"inputs": len(inputs), "seconds": times["ms_p50"] / 1e3, "cpu": times["cpu_ms"] / 1e3, "process_mib": round(process_peak_mib())}


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


def under_load(folder: str, count: int, clients: int) -> tuple[dict, traffic.Answered]:
    """Seconds, processor seconds and memory of a server for all requests, after `offline` has written the truth."""
    import numpy as np

    truth = np.load(os.path.join(folder, "truth.npy"))
    made = traffic.pool(models.IMAGES)
    wanted = traffic.requests(count, len(made))
    with Served(folder) as served:
        traffic.send(served.port, made, wanted[: count // 4], truth, clients)
        before, cpu = served.resident(), served.cpu()
        told = traffic.send(served.port, made, wanted, truth, clients)
        cpu, after = served.cpu() - cpu, served.resident()
    return {"seconds": told.seconds, "cpu": cpu, "before_mib": round(before), "after_mib": round(after)}, told


def server(args) -> tuple[list[dict], list[str]]:
    """Rows and missed aims of the part `server`."""
    from bench.measure import in_child

    with tempfile.TemporaryDirectory() as folder:
        models.write(SIZE, folder)
        alone = in_child("bench.serve.run", "offline", folder, args.requests)
        loaded, told = under_load(folder, args.requests, args.clients)
    waits = sorted(told.waits) or [0.0]
    about = {"part": "serve", "size": SIZE, "n": alone["inputs"]}
    wall, cpu = alone["seconds"] / loaded["seconds"], alone["cpu"] / loaded["cpu"]
    rows = [
        {**about, "name": "encode offline", "ms_p50": round(1e3 * alone["seconds"]), "cpu_ms": round(1e3 * alone["cpu"])},
        {
            **about,
            "name": f"serve, {args.clients} clients",
            "ms_p50": round(1e3 * loaded["seconds"]),
            "cpu_ms": round(1e3 * loaded["cpu"]),
            "ratio": round(wall, 3),
            "cpu_ratio": round(cpu, 3),
            "ratio_to": "encode offline over it",
            "rss_mib": loaded["after_mib"] - loaded["before_mib"],
            "process_mib": loaded["after_mib"],
        },
    ]
    print(f"{args.requests} requests, {alone['inputs']} inputs, {told.tokens} tokens, {args.clients} clients")
    print(f"  encode offline   {alone['seconds']:7.2f} s  {alone['cpu']:7.2f} s of processor")
    print(f"  serve            {loaded['seconds']:7.2f} s  {loaded['cpu']:7.2f} s of processor")
    print(f"  throughput over offline: {wall:.3f} by wall clock, {cpu:.3f} by processor time")
    print(f"  answers: {told.requests} of {args.requests}, largest difference from encode alone {told.worst:.2g}")
    print(f"  a request took {waits[len(waits) // 2] * 1e3:.0f} ms at the median, {waits[len(waits) * 95 // 100] * 1e3:.0f} at 95 %")
    print(f"  resident memory: {loaded['before_mib']} MiB after a quarter as many requests, {loaded['after_mib']} at the end")
    missed = [f"serve: {told.errors[0]} ({len(told.errors)} such)"] if told.errors else []
    if told.worst > 1e-6:
        missed.append(f"serve: an answer differs by {told.worst:.2g} from encode alone, aim 1e-6")
    if cpu < 0.8:
        missed.append(f"serve: {cpu:.2f} of offline throughput by processor time, aim 0.8")
    if loaded["after_mib"] > 1.1 * loaded["before_mib"] + 20:
        missed.append(f"serve: memory grew from {loaded['before_mib']} to {loaded['after_mib']} MiB")
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


CHILDREN = {"offline": offline}

if __name__ == "__main__":
    sys.exit(main())
