"""What GradCache keeps between its two passes: graphs of chunks and features of frozen parts, within bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from contrastive_kernels.gradient_sync import GradientSync

_MIB = 2**20
_SHARE_OF_FREE = 0.8


def retained_chunks(retain: int | str, count: int) -> frozenset[int]:
    """Indices of the chunks that keep their graph: the last `retain` of `count`, or all of them."""
    kept = count if retain == "all" else min(int(retain), count)
    return frozenset(range(count - kept, count))


def graph_bytes(encode: Callable[[], torch.Tensor]) -> int:
    """Bytes that the graph of one `encode()` call holds for its backward, parameters left out.

    Counted where autograd saves tensors, storage by storage, so it is the same on every device and needs no allocator.
    """
    storages: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        graph = encode()
    del graph
    return sum(storages.values())


def fitting_chunks(
    tokens: Sequence[int], bytes_per_token: float, bound_mib: float | None, sync: GradientSync
) -> frozenset[int]:
    """The longest run of last chunks whose graphs fit into the bound; the same count on every rank."""
    bound = bound_mib * _MIB if bound_mib is not None else _SHARE_OF_FREE * torch.cuda.mem_get_info()[0]
    kept, used = 0, 0.0
    for chunk_tokens in reversed(tokens):
        used += chunk_tokens * bytes_per_token
        if used > bound:
            break
        kept += 1
    if sync.group is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        agreed = torch.tensor(kept, device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=sync.group)
        kept = int(agreed)
    return retained_chunks(kept, len(tokens))


@dataclass(frozen=True)
class _Kept:
    value: Any


class FeatureStore:
    """Features of frozen parts, by chunk, up to `keep_mib` MiB in all; what does not fit is not kept."""

    def __init__(self, keep_mib: float):
        self._bound = keep_mib * _MIB
        self._used = 0
        self._kept: dict[int, _Kept] = {}

    def offer(self, index: int, value: Any) -> None:
        size = _tensor_bytes(value)
        if self._used + size <= self._bound:
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
