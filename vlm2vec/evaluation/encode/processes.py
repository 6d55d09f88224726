"""Several processes under torchrun: who am I, and a barrier that waits for slow encoders. No tensors travel."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta


def process_group() -> tuple[int, int, Callable[[], None] | None]:
    """(rank, world, barrier). Starts a gloo group when torchrun set WORLD_SIZE > 1 and none is running.

    Files carry the work (shards, score files); the group only keeps time, so CPU and any number of GPUs do alike.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world <= 1:
        return 0, 1, None
    import torch.distributed as dist

    if not dist.is_initialized():
        # shards of one process may take hours longer than another's: a day, not the default half hour
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    return dist.get_rank(), dist.get_world_size(), dist.barrier


def local_device() -> str:
    """cuda:LOCAL_RANK where there is a GPU, else cpu."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def finish() -> None:
    """Leave the group, so that torchrun ends without a warning."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
