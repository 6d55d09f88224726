"""Activation offload: what a backward pass needs waits in host memory instead of on the device."""

from __future__ import annotations

import contextlib

import torch

from contrastive_kernels.gradcache.retention import belongs_to_weight, count_saved

# Below this a copy costs more than it frees.
_LEAST_BYTES = 1 << 20


def offloaded(enabled: bool, least_bytes: int = _LEAST_BYTES, move_cpu: bool = False) -> contextlib.AbstractContextManager[None]:
    """Within it, tensors saved for backward move to pinned host memory and come back when they are needed.

    Weights and their views stay where they are: they are on the device anyway. Copies are ordered on the current stream,
    so nothing waits for them. On a CPU nothing moves. What moves counts for `GradCache(retain="auto")` as what stays does.

    Args:
        enabled: False gives a context that does nothing.
        least_bytes: smaller tensors stay.
        move_cpu: copy on a CPU too, to unpinned memory, where that is wanted to look at what moves.
    """
    if not enabled:
        return contextlib.nullcontext()

    def pack(tensor: torch.Tensor):
        small = tensor.numel() * tensor.element_size() < least_bytes
        if small or (tensor.device.type == "cpu" and not move_cpu) or belongs_to_weight(tensor):
            count_saved(tensor)
            return tensor
        host = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=tensor.is_cuda)
        host.copy_(tensor, non_blocking=True)
        count_saved(host)
        return tensor.device, host

    def unpack(saved):
        if isinstance(saved, torch.Tensor):
            return saved
        device, host = saved
        return host.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
