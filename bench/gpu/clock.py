"""Times and memory of the GPU, and the same of a CPU for a dry run."""

from __future__ import annotations

import statistics
import time

import torch


class Cuda:
    def milliseconds(self, run) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_mib(self, run):
        """(result, MiB beyond what is there already)."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

    def forget(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def title(self) -> str:
        return torch.cuda.get_device_name()

    def room_for_truth(self, n: int, m: int) -> bool:
        """Whether float64 logits and what autograd makes of them fit beside the rest."""
        return 6 * 8 * n * m < torch.cuda.mem_get_info()[0]


class Host:
    def milliseconds(self, run) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    def timed(self, run):
        """(result, columns of a time) of a single call: a dry run's."""
        start = time.perf_counter()
        result = run()
        return result, {"ms_p50": round((time.perf_counter() - start) * 1e3, 4)}

    def forget(self) -> None:
        pass

    def title(self) -> str:
        return "CPU (nothing here is a measurement)"

    def room_for_truth(self, n: int, m: int) -> bool:
        return True


def percentiles(clock, run, repeats: int, warm: int = 3) -> dict:
    """ms_p20, ms_p50 and ms_p80 of `repeats` runs, at least two, after `warm` that are not counted."""
    for _ in range(warm):
        run()
    times = [clock.milliseconds(run) for _ in range(repeats)]
    low, _, _, high = statistics.quantiles(times, n=5)
    return {"ms_p20": round(low, 4), "ms_p50": round(statistics.median(times), 4), "ms_p80": round(high, 4)}


def median(clock, run, repeats: int, warm: int = 3) -> float:
    """Median milliseconds."""
    return percentiles(clock, run, repeats, warm)["ms_p50"]
