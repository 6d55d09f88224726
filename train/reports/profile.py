"""A trace of one step by torch.profiler, for https://ui.perfetto.dev: operators, kernels, and the phases of the step as named ranges."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from contrastive_kernels.gradcache import Phase

RANGE = "step: "  # before the names of phases in a trace


class StepProfile:
    """Traces one step of a run.

    Args:
        step: number of the step, from 1. output: the run's folder.
        rank, world_size: of this process; several ranks write a file each.
    """

    def __init__(self, step: int, output: Path, rank: int = 0, world_size: int = 1):
        name = f"profile-step-{step}" + (f"-rank-{rank}" if world_size > 1 else "") + ".json.gz"
        self.step, self.path = step, output / name
        self._profiler: torch.profiler.profile | None = None
        self._range: torch.profiler.record_function | None = None

    @property
    def is_running(self) -> bool:
        return self._profiler is not None

    def start(self) -> None:
        """Begins the trace, before the step's batch is waited for."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def enter(self, phase: str | None) -> None:
        """Ends the range that `enter` began, and begins another one; None begins none."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        if phase is not None and self.is_running:
            self._range = torch.profiler.record_function(RANGE + phase)
            self._range.__enter__()

    @contextlib.contextmanager
    def observe(self, phase: Phase) -> Iterator[None]:
        """GradCache's observer: a range for each phase, with the chunk's side, index and tokens where it is one's."""
        if not self.is_running:
            yield
            return
        self.enter(None)
        name = RANGE + phase.name + ("" if phase.chunk is None else f" {phase.chunk} ({phase.side}, {phase.tokens} tokens)")
        with torch.profiler.record_function(name):
            yield

    def finish(self) -> Path:
        """Ends the trace and writes it, by one rename. Returns where it is."""
        self.enter(None)
        self._profiler.stop()
        # The profiler goes by the ending, so that it stays the last part of the name.
        temporary = self.path.with_name(f".part-{self.path.name}")
        self._profiler.export_chrome_trace(os.fspath(temporary))
        os.replace(temporary, self.path)
        self._profiler = None
        return self.path

    def abandon(self) -> None:
        """Ends the trace of a step that was not finished."""
        if self._profiler is not None:
            self.enter(None)
            self._profiler.stop()
            self._profiler = None
