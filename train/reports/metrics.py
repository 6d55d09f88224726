"""What a run tells about its steps, averaged between two log lines."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch

from ..losses.several import PartFigures


class StepStats:
    """Collects per-step figures without waiting for the device; `drain` reads them once a log line."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._tensors: dict[str, list[torch.Tensor]] = {}
        self._shared: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._samples = 0
        self._tokens = 0
        self._padded = 0
        self._since = time.perf_counter()

    def add(self, result: Any, lengths: list[list[int]]) -> None:
        """One step: its loss statistics and the tokens of its samples by side (query, target, negatives)."""
        if isinstance(result.stats, PartFigures):
            for name, pairs in part_figures(result.stats).items():
                self._shared.setdefault(name, []).extend(pairs)
        else:
            for name, value in loss_figures(result.stats).items():
                self._tensors.setdefault(name, []).append(value.detach().float())
        self._samples += len(lengths[0])
        for side in lengths:
            self._tokens += sum(side)
            self._padded += max(side) * len(side)

    def drain(self, device: torch.device, world_size: int) -> dict[str, float]:
        """Figures since the last call, for all ranks: rates per second and means over the steps."""
        if not self._samples:
            return {}
        seconds = max(1e-9, time.perf_counter() - self._since)
        figures = {name: torch.stack(values).mean().item() for name, values in self._tensors.items()}
        for name, pairs in self._shared.items():  # a section's mean over its rows; a step may have had none
            values, shares = (torch.stack([pair[at].detach().float() for pair in pairs]) for at in (0, 1))
            total = shares.sum().item()
            if total > 0:
                figures[name] = torch.where(shares > 0, values * shares, 0).sum().item() / total
        figures["samples_per_second"] = self._samples * world_size / seconds
        figures["tokens_per_second"] = self._tokens * world_size / seconds
        figures["padding_avoided"] = 1.0 - self._tokens / self._padded
        figures["peak_memory_mib"] = peak_memory_mib(device)
        self._reset()
        return {name: round(value, 4) for name, value in figures.items()}


def part_figures(told: PartFigures) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """(value, share of the batch's rows) of what a sum of losses tells: `loss_SECTION`, and the statistics of those that have some."""
    figures = {f"loss_{label}": [pair] for label, pair in told.losses.items()}
    for stats, share in told.stats:
        for name, value in loss_figures(stats).items():
            figures.setdefault(name, []).append((value, share))
    return figures


def loss_figures(stats: Any) -> dict[str, torch.Tensor]:
    """The scalar figures of the loss's statistics under the names that are logged."""
    if stats is None:
        return {}
    return {
        "accuracy": stats.accuracy,
        "positive_similarity": stats.positive_cosine,
        "hardest_negative_similarity": stats.hardest_negative_cosine,
    }


def peak_memory_mib(device: torch.device) -> float:
    """Most memory used so far, MiB: what torch allocated on a GPU, the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 1024)
