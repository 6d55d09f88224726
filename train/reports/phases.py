"""Where a step's time goes: waiting for data, first pass, loss, second pass, synchronisation, optimizer, and what is left.

Time is cut at marks: all of it from one mark to the next belongs to the phase that the first one opens, so that the phases of an
interval add up to its length. On a CPU marks are readings of the clock. On a GPU they are events in the stream, read when the log
line is written and not before: nothing in a step waits for them, and a phase is the time until the GPU came to the end of it, so
that waiting for data is the time in which the GPU had nothing to do because a batch was not there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from contrastive_kernels.gradcache import Phase
from contrastive_kernels.gradcache.observer import FIRST_PASS, LOSS, PHASES, SECOND_PASS, SYNCHRONISATION

DATA, OPTIMIZER, OTHER = "waiting for data", "optimizer", "other"
# Names under which milliseconds a step are logged. "other": logging, checkpoints, evaluation, callbacks.
LOGGED = {
    DATA: "data_ms",
    FIRST_PASS: "first_pass_ms",
    LOSS: "loss_ms",
    SECOND_PASS: "second_pass_ms",
    SYNCHRONISATION: "sync_ms",
    OPTIMIZER: "optimizer_ms",
    OTHER: "other_ms",
}


class PhaseTimes:
    """Marks of one process.

    Args:
        device: where the step's work is done.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple[str, Any]] = []
        self._steps = 0

    def step_ended(self) -> None:
        """The optimizer's step is over; what comes now is other than the step's phases."""
        self.enter(OTHER)
        self._steps += 1

    def enter(self, phase: str) -> None:
        """From here on time belongs to `phase`. Does not wait for the device."""
        self._marks.append((phase, self._now()))

    @contextlib.contextmanager
    def observe(self, phase: Phase) -> Iterator[None]:
        """GradCache's observer; phases of chunks lie inside those of the step and are not told apart."""
        if phase.name not in PHASES:
            yield
            return
        self.enter(phase.name)
        try:
            yield
        finally:
            self.enter(OTHER)

    def drain(self) -> dict[str, float]:
        """Mean milliseconds of a step by logged name, and `step_ms`, their sum, since the last call; empty where no step ended.

        Waits for the device to come to the last mark. `step_ms` is the time from the first mark to the last over the steps: on a GPU
        it differs from the host's clock by what is under way at either end, of all the interval's steps together.
        """
        if not self._steps:
            return {}
        self.enter(self._marks[-1][0])
        if self.device.type == "cuda":
            self._marks[-1][1].synchronize()
        milliseconds = dict.fromkeys(LOGGED, 0.0)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            milliseconds[phase] += begin.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - begin)
        self._marks = self._marks[-1:]
        figures = {LOGGED[phase]: value / self._steps for phase, value in milliseconds.items()}
        self._steps = 0
        return {name: round(value, 4) for name, value in (figures | {"step_ms": sum(figures.values())}).items()}

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
