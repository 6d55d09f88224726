"""What a planned step does: live bytes by part, FLOPs, bytes moved and a predicted time, chunk by chunk."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .flops import operator_flops
from .live_bytes import LiveBytes, tensors_in


@dataclass
class Cost:
    """FLOPs of matrix products, bytes that operators read and wrote, and seconds by the meter's rates."""

    flops: float = 0.0
    moved: float = 0.0
    seconds: float = 0.0

    def add(self, other: Cost, times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.moved += times * other.moved
        self.seconds += times * other.seconds


@dataclass
class Span:
    """What happens between two moments. Bytes are relative to the first of them.

    Attributes:
        high: most bytes at one time; `at_high`: what they were, by part.
        left: bytes that are there at the end and were not at the start, by part (fewer than none: what has gone).
        cost: what was booked.
    """

    start: int
    start_parts: dict[str, int]
    high: int = 0
    at_high: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)


class Meter(LiveBytes):
    """`LiveBytes` that also books work to the chunk at hand.

    Args:
        flop_rate, byte_rate: FLOP/s and bytes/s that are reached; an operator takes the longer of its two times.
        dispatch: seconds that an operator takes at least.
    """

    def __init__(self, tensors, flop_rate: float, byte_rate: float, dispatch: float = 0.0):
        self.flop_rate, self.byte_rate, self.dispatch = flop_rate, byte_rate, dispatch
        self.costs: dict[Any, Cost] = {}
        self._book = self._cost_of(None)
        self._spans: list[tuple[Span, Cost]] = []  # open ones, and where their work goes in the end
        self._is_quiet = False
        super().__init__(tensors)

    def _cost_of(self, key: Any) -> Cost:
        return self.costs.setdefault(key, Cost())

    def count_flops(self, flops: float) -> None:
        """Products of a kernel that is no operator here."""
        self._book.flops += flops
        self._book.seconds += max(flops / self.flop_rate, self.dispatch)

    @contextlib.contextmanager
    def booking(self, key: Any) -> Iterator[None]:
        """Cost within it is booked to `key`; None is everything else."""
        before, self._book = self._book, self._cost_of(key)
        try:
            yield
        finally:
            self._book = before

    # Spans: seen once, replayed where the same happens again

    def begin(self) -> Span:
        """Opens a span. Spans nest; booking does not change inside of one."""
        span = Span(self.current, dict(self.by_part))
        self._spans.append((span, self._book))
        self._book = span.cost
        return span

    def end(self, span: Span) -> None:
        (last, book), self._spans = self._spans[-1], self._spans[:-1]
        assert last is span
        self._book = book
        book.add(span.cost)
        span.left = _change(span.start_parts, self.by_part)

    def replay(self, span: Span) -> None:
        """Peaks and work as if the span happened now; what it leaves behind is the caller's to make."""
        self._book.add(span.cost)
        self.reach(_sum(self.by_part, span.at_high))

    def reach(self, parts: dict[str, int]) -> None:
        """Peaks as if there were so many bytes of each part now."""
        top = sum(parts.values())
        for span, _ in self._spans:
            if top - span.start > span.high:
                span.high, span.at_high = top - span.start, _change(span.start_parts, parts)
        if top > self.peak:
            self.peak, self.at_peak = top, dict(parts)

    def hold(self, part: str, size: int) -> torch.Tensor:
        """A tensor that stands for so many bytes; its being made is no peak."""
        with self.quiet(), self.counting_as(part):
            return torch.empty(size, dtype=torch.uint8)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """What is made within it counts, but makes no peak: a replay has said what the peak was."""
        before, self._is_quiet = self._is_quiet, True
        try:
            yield
        finally:
            self._is_quiet = before

    def part_of(self, tensor: torch.Tensor) -> str:
        return self._known[tensor.untyped_storage()._cdata].part

    def reference(self, tensor: torch.Tensor) -> weakref.ref:
        """Refers to nothing once the tensor's storage is freed."""
        return self._known[tensor.untyped_storage()._cdata].reference

    def _risen(self) -> None:
        if self._is_quiet:
            return
        for span, _ in self._spans:
            if self.current - span.start > span.high:
                span.high, span.at_high = self.current - span.start, _change(span.start_parts, self.by_part)
        super()._risen()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        if function is torch.ops.prim.device.default:  # a fake tensor is asked where it is: no operator, and the most frequent call
            return args[0].fake_device if isinstance(args[0], FakeTensor) else function(*args)
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(function, types, args, kwargs)
        if function.namespace in ("fsdp", "c10d", "_c10d_functional") and function._schema.name != "c10d::allreduce_":
            self.relabel(out, "gathered weights")
        if not _is_view(function):
            flops = operator_flops(function, args, kwargs, out)
            moved = sum(t.numel() * t.element_size() for t in tensors_in((args, tuple(kwargs.values()), out)))
            self._book.flops += flops
            self._book.moved += moved
            self._book.seconds += max(flops / self.flop_rate, moved / self.byte_rate, self.dispatch)
        return out


def _change(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {part: size - before.get(part, 0) for part, size in after.items() if size != before.get(part, 0)}


def _sum(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {part: a.get(part, 0) + b.get(part, 0) for part in {**a, **b}}


@functools.cache
def _is_view(function) -> bool:
    """Whether an operator hands on storage it was given, or makes it without writing."""
    name = function._schema.name
    if name in ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::detach", "aten::empty_strided"):
        return True
    arguments = function._schema.arguments
    return any(a.alias_info is not None and not a.alias_info.is_write for a in arguments)
