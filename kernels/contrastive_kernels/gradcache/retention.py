"""What GradCache keeps between its two passes: graphs of chunks and features of frozen parts, within bounds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..core.workspace import free_cuda_bytes
from .gradient_sync import GradientSync

_MIB = 2**20
_SHARE_OF_FREE = 0.8


def retained_chunks(retain: int | str, count: int) -> frozenset[int]:
    """Indices of the chunks that keep their graph: the last `retain` of `count`, or all of them."""
    count_kept = count if retain == "all" else min(int(retain), count)
    return frozenset(range(count - count_kept, count))


def belongs_to_weight(tensor: torch.Tensor) -> bool:
    """Whether a tensor that a graph saves is a weight or a view of one, frozen or not: it is there without the graph."""
    owner = tensor if tensor._base is None else tensor._base
    return isinstance(owner, torch.nn.Parameter) or (owner.is_leaf and owner.requires_grad)


@dataclass
class SavedBytes:
    """Storages that graphs save for their backward, weights left out."""

    storages: dict[int, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())

    def add(self, tensor: torch.Tensor) -> None:
        if not belongs_to_weight(tensor):
            storage = tensor.untyped_storage()
            self.storages[storage.data_ptr()] = storage.nbytes()


_counts: list[SavedBytes] = []


@contextlib.contextmanager
def counting_saved() -> Iterator[SavedBytes]:
    """Counts what autograd saves within it, storage by storage: the same on every device, and needs no allocator.

    Saved-tensor hooks that are set further inside hide what they save; they report it with `count_saved`.
    """
    count = SavedBytes()
    _counts.append(count)
    try:
        with torch.autograd.graph.saved_tensors_hooks(_counted, lambda tensor: tensor):
            yield count
    finally:
        _counts.remove(count)


def _counted(tensor: torch.Tensor) -> torch.Tensor:
    count_saved(tensor)
    return tensor


def count_saved(tensor: torch.Tensor) -> None:
    """Reports a tensor that lives until a backward pass, from hooks that hide it from `counting_saved`."""
    if _counts:
        _counts[-1].add(tensor)


@dataclass
class GraphSize:
    """Bytes of a chunk's graph: a constant (copies of weights that autocast makes) and what grows with the tokens."""

    constant: float
    per_token: float

    @classmethod
    def fit(cls, samples: Sequence[tuple[int, float]]) -> GraphSize:
        """Through (tokens, bytes) of measured chunks; where no sensible line goes through them, the dearest token counts."""
        (fewer, small), (more, large) = min(samples), max(samples)
        if more > fewer and large < float("inf"):
            slope = (large - small) / (more - fewer)
            constant = small - slope * fewer
            if slope >= 0 and constant >= 0:
                return cls(constant, slope)
        return cls(0.0, max(size / max(1, tokens) for tokens, size in samples))

    def of(self, tokens: int) -> float:
        return self.constant + self.per_token * max(1, tokens)

    def observe(self, tokens: int, size: float) -> None:
        """A graph that turned out larger raises what is expected of the next step's."""
        self.per_token = max(self.per_token, (size - self.constant) / max(1, tokens))


def fitting_chunks(sizes: Sequence[float], bound_mib: float | None, sync: GradientSync) -> frozenset[int]:
    """The longest run of last chunks whose graphs (bytes each) fit into the bound; the same count on every rank."""
    bound = bound_mib * _MIB if bound_mib is not None else _SHARE_OF_FREE * free_cuda_bytes()
    count_kept, used = 0, 0.0
    for size in reversed(sizes):
        used += size
        if used > bound:
            break
        count_kept += 1
    (most_negative,) = sync.largest([-count_kept])  # the fewest of any rank
    return retained_chunks(-most_negative, len(sizes))


@dataclass(frozen=True)
class _Kept:
    value: Any


class FeatureStore:
    """Features of frozen parts, by chunk, up to `keep_mib` MiB in all; what does not fit is not kept."""

    def __init__(self, keep_mib: float):
        self._bound = keep_mib * _MIB
        self._used = 0
        self._kept: dict[int, _Kept] = {}

    def offer(self, index: int, value: Any, keep: bool | None = None) -> None:
        """Keeps a chunk's features where they fit; `keep` says it whatever the bound."""
        size = _tensor_bytes(value)
        if keep if keep is not None else self._used + size <= self._bound:
            self._used += size
            self._kept[index] = _Kept(value)

    def get(self, index: int) -> _Kept | None:
        return self._kept.get(index)

    def drop(self, index: int) -> None:
        self._kept.pop(index, None)


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_tensor_bytes(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_tensor_bytes(v) for v in value)
    return 0
