"""How much memory the device of a run has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

_GROUP = Path("/sys/fs/cgroup")  # of this container, on Linux


@dataclass(frozen=True)
class Memory:
    """Bytes: what could be allocated now, and all there is."""

    free: int
    total: int


def device_memory(on_gpu: bool) -> Memory | None:
    """Of this process's GPU, or of the machine without swap, within the bound of its container. None: not known."""
    if on_gpu:
        return Memory(*torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0"))))
    import psutil

    machine = psutil.virtual_memory()
    group = _group_memory(_GROUP)
    if group is None or group.total > machine.total:
        return Memory(machine.available, machine.total)
    return Memory(min(group.free, machine.available), group.total)


def _group_memory(folder: Path) -> Memory | None:
    """The bound of a control group and what is left of it; files that could be read again do not count as used."""
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        files = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines()).get("inactive_file", "0")
    except (OSError, ValueError):  # no group, or one without a bound ("max")
        return None
    return Memory(max(0, limit - used + int(files)), limit)
