"""Value and gradients at the size of a large training batch, next to the three products that are its limit."""

from __future__ import annotations

from bench.gpu import timing


def checks(machine):
    n, d, repeats = (16_384, 1536, 15) if not machine.dry else (24, 16, 2)
    yield from timing.checks(machine, timing.ours(machine), n, n, d, repeats)
