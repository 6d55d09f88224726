"""Launches of Triton kernels noted where the launchers make them, and not made."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from triton.runtime.jit import JITFunction

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass
class CapturedLaunch:
    """One launch: the function, what it was called with by name, its launch options and its grid."""

    function: JITFunction
    arguments: dict
    options: dict
    grid: tuple
    flops: int = 0  # as its launcher notes them
    bytes: int = 0
    tiles: int = 0  # 0: as many as programs


@contextlib.contextmanager
def captured_launches():
    """Instead of launching, note the launches made inside the block."""
    launches: list[CapturedLaunch] = []

    def run(self, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        named = dict(zip(self.arg_names, args)) | kwargs
        launches.append(CapturedLaunch(self, named, options, grid if isinstance(grid, tuple) else grid(named)))

    original, JITFunction.run = JITFunction.run, run
    try:
        yield launches
    finally:
        JITFunction.run = original
