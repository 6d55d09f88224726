"""Rows that cannot be read: a few cost themselves, most of them cost the run, for then it is a folder that is wrong."""

from __future__ import annotations

from typing import Any

import torch

ENOUGH_ROWS = 64  # before so many were seen, those left out say nothing of the rest


class UnreadableRows:
    """Counts the rows of all ranks that were left out, and stops a run of which more than half the rows cannot be read."""

    def __init__(self) -> None:
        self.seen = self.lost = 0
        self._last: str | None = None

    def add(self, errors: list[str], rows: int, *, device: torch.device, world_size: int = 1, is_last: bool = False) -> None:
        """One step. Collective, so that all ranks stop at the same one.

        Args:
            errors: a line for each of this rank's rows that was left out.
            rows: of the step, over all ranks.
            is_last: the run has no more steps, so that fewer rows than usual decide.

        Raises:
            ValueError: more than half of the rows so far were left out; names one of them.
        """
        self._last = errors[-1] if errors else self._last
        self.seen += rows
        self.lost += self._summed(len(errors), device, world_size)
        if 2 * self.lost > self.seen and (is_last or self.seen >= ENOUGH_ROWS):
            raise ValueError(unreadable(self.lost, f"the first {self.seen}", self._someones(world_size)))

    @staticmethod
    def _summed(count: int, device: torch.device, world_size: int) -> int:
        if world_size == 1:
            return count
        total = torch.tensor(count, device=device)
        torch.distributed.all_reduce(total)
        return int(total)

    def _someones(self, world_size: int) -> str | None:
        if world_size == 1:
            return self._last
        everyone: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(everyone, self._last)
        return next((last for last in everyone if last is not None), None)


def unreadable(lost: int, seen: str, last: str | None) -> str:
    mend = "look at data.root and data.images, or at the source's path and images"
    return f"{lost} of {seen} rows cannot be read, the last one because of: {last}; {mend}"
