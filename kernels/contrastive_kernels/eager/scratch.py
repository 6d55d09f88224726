"""Scratch memory of the CPU paths in huge pages: writing fresh memory for the first time costs a third as much."""

from __future__ import annotations

import math
import mmap

import torch

LEAST_BYTES = 8 << 20


def scratch(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(count,) uninitialised elements that live as long as the tensor and its views."""
    size = math.ceil(count * dtype.itemsize / mmap.PAGESIZE) * mmap.PAGESIZE
    if device.type != "cpu" or size < LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them: the pages are small ones
        pass
    return torch.frombuffer(pages, dtype=dtype, count=count)
