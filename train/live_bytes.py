"""Bytes of live tensors while code runs: counted storage by storage, on real tensors and on fake ones alike."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Within it, every tensor that an operator returns counts until its storage is freed.

    A storage counts once, however many views it has. What a kernel allocates inside itself and frees before it returns is
    not seen: neither with real tensors nor with fake ones.

    Args:
        tensors: what is alive already and should count: parameters, buffers, inputs.

    Attributes:
        current: bytes alive now.
        peak: most bytes alive at one time so far.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: dict[int, tuple[weakref.ref, int]] = {}
        for tensor in tensors:
            self.track(tensor)

    def track(self, tensor: torch.Tensor) -> None:
        """Counts a tensor that was made elsewhere."""
        for part in _plain(tensor):
            storage = part.untyped_storage()
            key = storage._cdata
            known = self._known.get(key)
            if known is not None and known[0]() is not None:
                continue
            size = storage.nbytes()
            self._known[key] = (weakref.ref(storage, lambda _, key=key, size=size: self._forget(key, size)), size)
            self.current += size
            self.peak = max(self.peak, self.current)

    def _forget(self, key: int, size: int) -> None:
        self.current -= size
        known = self._known.get(key)
        if known is not None and known[0]() is None:
            del self._known[key]

    def restart_peak(self) -> int:
        """The peak so far; from here on it is counted anew."""
        peak, self.peak = self.peak, self.current
        return peak

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.track(tensor)
        return out


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with storage behind one: a sharded tensor's local part, a quantised one's data."""
    local = getattr(tensor, "_local_tensor", None)
    yield tensor if local is None else local
