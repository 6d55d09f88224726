"""Bytes of live tensors while code runs: counted storage by storage, on real tensors and on fake ones alike."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass
class _Storage:
    reference: weakref.ref
    size: int
    part: str


class LiveBytes(TorchDispatchMode):
    """Within it, every tensor that an operator returns counts until its storage is freed.

    A storage counts once, however many views it has, and follows when it is resized (as FSDP2 resizes what it gathers).
    Sparse tensors count their indices and values.
    What a kernel allocates inside itself and frees before it returns is not seen: neither with real tensors nor with fake
    ones.

    Args:
        tensors: what is alive already and should count, as the part "weights": parameters, buffers.

    Attributes:
        current: bytes alive now.
        peak: most bytes alive at one time so far.
        part: name under which new storages count.
        by_part: bytes alive now by part.
        at_peak: the same when `peak` was reached.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.current = self.peak = 0
        self.part = "weights"
        self.by_part: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self._known: dict[int, _Storage] = {}
        for tensor in tensors:
            self.track(tensor)
        self.part = "activations"

    def track(self, tensor: torch.Tensor) -> None:
        """Counts a tensor that was made elsewhere."""
        for part in _plain(tensor):
            # a tensor in oneDNN's own layout has no storage that Python can see
            holder = part if part.is_mkldnn else part.untyped_storage()
            key = _key(holder)
            known = self._known.get(key)
            if known is not None and known.reference() is not None:
                continue
            reference = weakref.ref(holder, lambda gone, key=key: self._forget(key, gone))
            self._known[key] = _Storage(reference, 0, self.part)
            self._resized(key, holder.nbytes if part.is_mkldnn else holder.nbytes())

    def relabel(self, tensors: Any, part: str) -> None:
        """Counts storages that are known, of tensors in any nesting, as another part from now on."""
        for tensor in tree_iter(tensors):
            for plain in _plain(tensor) if isinstance(tensor, torch.Tensor) else ():
                known = self._known.get(_key(plain if plain.is_mkldnn else plain.untyped_storage()))
                if known is not None and known.part != part:
                    self.by_part[known.part] -= known.size
                    self.by_part[part] = self.by_part.get(part, 0) + known.size
                    known.part = part

    @contextlib.contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """New storages count as `part` within it."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def _resized(self, key: int, size: int) -> None:
        known = self._known[key]
        change, known.size = size - known.size, size
        self.current += change
        self.by_part[known.part] = self.by_part.get(known.part, 0) + change
        if change > 0:
            self._risen()

    def _risen(self) -> None:
        if self.current > self.peak:
            self.peak = self.current
            self.at_peak = dict(self.by_part)

    def _forget(self, key: int, gone: weakref.ref) -> None:
        known = self._known.get(key)
        # The address may belong to a newer storage by now.
        if known is not None and known.reference is gone:
            self._resized(key, 0)
            del self._known[key]

    def restart_peak(self) -> int:
        """The peak so far; from here on it is counted anew."""
        peak, self.peak = self.peak, self.current
        self.at_peak = dict(self.by_part)
        return peak

    def __enter__(self) -> LiveBytes:
        original = self._original_resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int):
            result = original(storage, size)
            known = self._known.get(storage._cdata)
            if known is not None:
                if known.size == 0:  # FSDP2 gives a gathered weight its bytes
                    known.part = "gathered weights"
                self._resized(storage._cdata, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *exc) -> None:
        torch.UntypedStorage.resize_ = self._original_resize
        super().__exit__(*exc)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self.track(tensor)
        return out


def _key(holder: torch.Tensor | torch.UntypedStorage) -> int:
    return id(holder) if isinstance(holder, torch.Tensor) else holder._cdata


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of an operator's arguments or results, in lists or not; faster than a walk over any tree."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors_in(entry)


_COMPRESSED = {
    torch.sparse_csr: (torch.Tensor.crow_indices, torch.Tensor.col_indices),
    torch.sparse_bsr: (torch.Tensor.crow_indices, torch.Tensor.col_indices),
    torch.sparse_csc: (torch.Tensor.ccol_indices, torch.Tensor.row_indices),
    torch.sparse_bsc: (torch.Tensor.ccol_indices, torch.Tensor.row_indices),
}


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with storage behind one: a sharded tensor's local part, a sparse one's indices and values, a quantised one's data."""
    local = getattr(tensor, "_local_tensor", None)
    if local is not None:
        yield local
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in _COMPRESSED:
        yield from (*(indices(tensor) for indices in _COMPRESSED[tensor.layout]), tensor.values())
    else:
        yield tensor
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, torch.Tensor))
        state = state.state2
