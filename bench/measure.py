"""What the tables measure with: time by turns, resident memory, and a process of its own for whatever has a peak.

python -m bench.measure MODULE WHAT JSON        what `in_child` starts: MODULE.CHILDREN[WHAT](*JSON), its answer as a line of JSON
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
# A process whose malloc gives every freed block back: its resident peak tells of tensors, not of malloc.
BLOCKS_GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def unit_rows(n: int, d: int, dtype, seed: int):
    """(n, d) rows of length 1 in random directions, the same for a seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1).to(dtype)


def interleaved(runs: dict, repeat: int) -> dict[str, tuple[float, float]]:
    """Minimum wall and processor milliseconds of each run, in turns; the first turn warms up and is not counted."""
    best = dict.fromkeys(runs, (float("inf"), float("inf")))
    for turn in range(repeat + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            now = ((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3)
            if turn:
                best[name] = tuple(map(min, best[name], now))
    return best


def percentiles(seconds: list[float]) -> dict[str, float]:
    """ms_p20, ms_p50 and ms_p80 of `seconds`."""
    ordered = sorted(seconds)
    return {f"ms_p{p}": round(1000 * ordered[min(len(ordered) - 1, p * len(ordered) // 100)], 2) for p in (20, 50, 80)}


def timed(run, repeat: int) -> tuple[object, dict[str, float]]:
    """(last result, milliseconds by `percentiles`, and `cpu_ms`: the median of the processor time of all threads)."""
    out, seconds, cpu_seconds = run(), [], []  # the first run warms up
    for _ in range(repeat):
        start, cpu = time.perf_counter(), time.process_time()
        out = run()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
    return out, {**percentiles(seconds), "cpu_ms": percentiles(cpu_seconds)["ms_p50"]}


def resident(field: str) -> float:
    """MiB that Linux states for this process: VmRSS, resident now, or VmHWM, the most so far."""
    with open("/proc/self/status", encoding="ascii") as f:
        line = next(line for line in f if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def restart_resident_peak() -> float:
    """Resident MiB now; the peak that `resident("VmHWM")` reads begins anew."""
    gc.collect()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return resident("VmRSS")


def process_peak_mib() -> float:
    """The most MiB that this process has held since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child_environment(without: tuple[str, ...] = (), **variables: str) -> dict[str, str]:
    """The environment of a child that finds this checkout first, whatever else is installed.

    without: beginnings of names that it does not inherit. variables: what it is given besides.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(without or ("\0",))}
    paths = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | variables


def in_child(module: str, what: str, *arguments, without: tuple[str, ...] = (), **variables: str):
    """The answer of `module`.CHILDREN[what](*arguments) in a process of its own.

    Arguments and answer are what JSON holds. without, variables: as of `child_environment`.

    Raises:
        RuntimeError: with the end of what the process wrote to stderr, when it failed.
    """
    command = [sys.executable, "-m", "bench.measure", module, what, json.dumps(arguments)]
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=child_environment(without, **quiet, **variables))
    if done.returncode:
        raise RuntimeError(f"{module}: {what} {' '.join(map(str, arguments))} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    module, what, arguments = sys.argv[1:4]
    print(json.dumps(importlib.import_module(module).CHILDREN[what](*json.loads(arguments))))
