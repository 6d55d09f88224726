"""Counts the work that launchers really start: grid times tile, not a formula.

    with work.record() as launches:
        info_nce(query, target, backend="triton")
    sum(launch.flops for launch in launches)

Tests hold these sums against the cost model of `roofline.py`, so that the model cannot drift from the kernels.
"""

import contextlib
import contextvars
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """One kernel or library call: floating point operations of tensor cores, bytes of memory read and written at least once."""

    name: str
    grid: int
    flops: int
    bytes_read: int
    bytes_written: int

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


_launches: contextvars.ContextVar = contextvars.ContextVar("contrastive_kernels_launches", default=None)


@contextlib.contextmanager
def record():
    """Collect the launches made inside the block in a list."""
    launches: list[Launch] = []
    token = _launches.set(launches)
    try:
        yield launches
    finally:
        _launches.reset(token)


def note(name: str, grid: int, flops: int, bytes_read: int, bytes_written: int) -> None:
    launches = _launches.get()
    if launches is not None:
        launches.append(Launch(name, grid, flops, bytes_read, bytes_written))


def size(*tensors) -> int:
    """Bytes that the tensors hold; None counts nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
