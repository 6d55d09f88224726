"""Activation offload: what a backward pass needs waits in host memory instead of on the device."""

from __future__ import annotations

import contextlib

import torch

# Below this a copy costs more than it frees.
_LEAST_BYTES = 1 << 20


def offloaded(enabled: bool, least_bytes: int = _LEAST_BYTES, move_cpu: bool = False) -> contextlib.AbstractContextManager[None]:
    """Within it, tensors saved for backward move to pinned host memory and come back when they are needed.

    Weights and their views stay where they are: they are on the device anyway. Copies are ordered on the current stream,
    so nothing waits for them. On a CPU nothing moves.

    Args:
        enabled: False gives a context that does nothing.
        least_bytes: smaller tensors stay.
        move_cpu: copy on a CPU too, to unpinned memory, where that is wanted to look at what moves.
    """
    if not enabled:
        return contextlib.nullcontext()

    def pack(tensor: torch.Tensor):
        small = tensor.numel() * tensor.element_size() < least_bytes
        if small or (tensor.device.type == "cpu" and not move_cpu) or _is_weight(tensor):
            return tensor
        host = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=tensor.is_cuda)
        host.copy_(tensor, non_blocking=True)
        return tensor.device, host

    def unpack(saved):
        if isinstance(saved, torch.Tensor):
            return saved
        device, host = saved
        return host.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _is_weight(tensor: torch.Tensor) -> bool:
    owner = tensor if tensor._base is None else tensor._base
    return isinstance(owner, torch.nn.Parameter) or (owner.is_leaf and owner.requires_grad)
