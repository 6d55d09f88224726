"""What a part is made of: checks, and the machine they run on."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

PARTS = ("env", "smoke", "loss", "profile", "gate", "train", "sizes", "peers", "attention")
PROCESSES = {"gate": 12}  # of a part on a GPU: the gate compiles two hundred kernels, one after another in each process
NEEDS = 5.0  # seconds that must be left for a check to be started


@dataclass(frozen=True)
class Check:
    """One thing to try.

    Args:
        run: returns rows of the table, one row, a word for the note, or None. A row may hold `wrong`, a complaint.
        ours: whether a failure is a complaint; else it is a note.
        seconds: a check that takes longer hangs, and its process is ended. needs: seconds that must be left to start it.
    """

    name: str
    run: Callable[[], list[dict] | dict | str | None]
    ours: bool = True
    seconds: float = 60.0
    needs: float = NEEDS


class NotHere(Exception):
    """Raised by a check that cannot be made on this device: told, and no complaint."""


@dataclass(frozen=True)
class Machine:
    """Where checks run. device: "cuda" or "cpu". dry: everything tiny. ends: when time is out, by `time.monotonic`."""

    device: str
    dry: bool = False
    ends: float = float("inf")

    def left(self) -> float:
        return self.ends - time.monotonic()

    @functools.cached_property
    def clock(self):
        from bench.gpu.clock import Cuda, Host

        return Cuda() if self.device == "cuda" else Host()

    def needs_cuda(self, why: str) -> None:
        if self.device != "cuda":
            raise NotHere(f"{why} needs CUDA")
