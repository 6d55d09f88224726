"""How much scratch a call may use: as asked, else what the device allows."""

from __future__ import annotations

import functools
import logging

import torch
import torch.distributed as dist

from ..options import InfoNCEOptions

logger = logging.getLogger(__name__)
MIB = 1 << 20
DEFAULT_MIB = 256
SHARE_OF_CARD = 10  # one part in so many of a GPU's memory


def workspace_bytes(options: InfoNCEOptions, query: torch.Tensor, target: torch.Tensor, cell_bytes: int = 8) -> int:
    """Bound on scratch in bytes: `workspace_mib`, else 256 MiB, else on CUDA a tenth of the card's memory if that is more.

    What is free at the moment does not count, for panels, and with them the last bits of d_target, would follow what the process
    did before. Only a call whose one panel would not fit into what is free is bounded lower, by whole powers of two, and told once;
    `workspace_mib` keeps it from that. cell_bytes: of scratch for a pair of a row and a column, at most.
    """
    if options.workspace_mib is not None:
        return int(options.workspace_mib * MIB)
    least, device = DEFAULT_MIB * MIB, query.device
    if device.type != "cuda":
        return least
    bound = max(least, card_bytes(device) // SHARE_OF_CARD)
    # a question to the driver takes longer than a small call, and is not allowed while a graph is captured
    one_panel = whole_panel_bytes(options, query, target, cell_bytes)
    if one_panel <= least or torch.cuda.is_current_stream_capturing():
        return bound
    return lowered(bound, least, one_panel, free_cuda_bytes(device))


def lowered(bound: int, least: int, one_panel: int, free: int) -> int:
    """The bound, halved until it is at most `free` where a call would take more than that; never below `least`."""
    asked = bound
    while min(bound, one_panel) > max(least, free):
        bound //= 2
    bound = max(bound, least)
    if bound < asked:
        _tell_once(asked // MIB, bound // MIB)
    return bound


@functools.cache
def _tell_once(asked: int, bound: int) -> None:
    logger.warning(
        "contrastive_kernels: scratch is bounded by %d MiB instead of %d, since the GPU has no more: slower, and the last bits of "
        "gradients may differ from a run with more memory; workspace_mib sets the bound",
        bound,
        asked,
    )


def whole_panel_bytes(options: InfoNCEOptions, query: torch.Tensor, target: torch.Tensor, cell_bytes: int = 8) -> int:
    """More scratch than any way of computing the loss uses, all rows in one panel."""
    world = 1 if options.group is None else dist.get_world_size(options.group)
    columns = len(target) + (len(query) if options.query_negatives else 0) + (len(target) if options.target_negatives else 0)
    levels = len(options.matryoshka_dims or (0,))
    return len(query) * (world * columns * levels * cell_bytes + 16 * query.shape[1])


@functools.cache
def card_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def free_cuda_bytes(device: torch.device | None = None) -> int:
    """What a CUDA allocation can get: free on the device, or held by torch's allocator without being used."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
