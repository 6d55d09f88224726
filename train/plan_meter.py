"""What a planned step does: live bytes by part, FLOPs, bytes moved and a predicted time, chunk by chunk."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from train.flops import operator_flops
from train.live_bytes import LiveBytes, tensors_in


@dataclass
class Work:
    """FLOPs of matrix products, bytes that operators read and wrote, and seconds by the meter's rates."""

    flops: float = 0.0
    moved: float = 0.0
    seconds: float = 0.0

    def add(self, other: Work, times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.moved += times * other.moved
        self.seconds += times * other.seconds


class Meter(LiveBytes):
    """`LiveBytes` that also books work to the chunk at hand.

    Args:
        flop_rate, byte_rate: FLOP/s and bytes/s that are reached; an operator takes the longer of its two times.
    """

    def __init__(self, tensors, flop_rate: float, byte_rate: float):
        self.flop_rate, self.byte_rate = flop_rate, byte_rate
        self.work: dict[Any, Work] = {}
        self._book = self._work_of(None)
        super().__init__(tensors)

    def _work_of(self, key: Any) -> Work:
        return self.work.setdefault(key, Work())

    def count_flops(self, flops: float) -> None:
        """Products of a kernel that is no operator here."""
        self._book.flops += flops
        self._book.seconds += flops / self.flop_rate

    @contextlib.contextmanager
    def booking(self, key: Any) -> Iterator[None]:
        """Work within it is booked to `key`; None is everything else."""
        before, self._book = self._book, self._work_of(key)
        try:
            yield
        finally:
            self._book = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(function, types, args, kwargs)
        if function.namespace in ("fsdp", "c10d", "_c10d_functional"):
            self.relabel(out, "gathered weights")
        if not _is_view(function):
            flops = operator_flops(function, args, kwargs, out)
            moved = sum(t.numel() * t.element_size() for t in tensors_in((args, tuple(kwargs.values()), out)))
            self._book.flops += flops
            self._book.moved += moved
            self._book.seconds += max(flops / self.flop_rate, moved / self.byte_rate)
        return out


@functools.cache
def _is_view(function) -> bool:
    """Whether an operator hands on storage it was given, or makes it without writing."""
    name = function._schema.name
    if name in ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::detach", "aten::empty_strided"):
        return True
    arguments = function._schema.arguments
    return any(a.alias_info is not None and not a.alias_info.is_write for a in arguments)
