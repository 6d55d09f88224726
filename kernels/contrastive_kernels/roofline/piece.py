"""One kernel of a plan, as the cost model prices it."""

from __future__ import annotations

from dataclasses import dataclass

from .gpu import GIB

HOST_OPERATION = 6.5e-6  # the host's side of a launch: an operation of torch


@dataclass(frozen=True)
class Piece:
    """One kernel of a plan: what it does, the seconds it is predicted to take on the device, and those of the host to launch it."""

    name: str
    flops: float
    read: float
    written: float
    seconds: float
    times: int = 1
    host: float = HOST_OPERATION

    @property
    def bytes(self) -> float:
        return self.read + self.written

    def line(self) -> str:
        return (
            f"{self.times:>4} x {self.name:<28} {self.flops / 1e12:>9.3f} TFLOP {self.bytes / GIB:>8.3f} GiB "
            f"{self.seconds * 1e3:>9.3f} ms each, {self.times * self.seconds * 1e3:>9.3f} ms"
        )
