"""How a run was started: `python -m train` on one device, or `torchrun` with a process for each; nothing else."""

from __future__ import annotations

import os

import torch

from ..command import TORCHRUN

# What `accelerate launch` sets, and what to do instead.
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "its hooks reduce gradients on every backward, of which GradCache makes many"),
    "ACCELERATE_USE_FSDP": ("accelerate's FSDP", "the model is sharded here, block by block, and would be sharded twice"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "its trainer owns the step, which is GradCache's here"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism config of accelerate", "ranks share the batch and nothing else here"),
}


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_other_launchers() -> None:
    """Raises ValueError where the process was started for a way of training that this one does not know."""
    for variable, (name, reason) in _REFUSED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            raise ValueError(
                f"{variable} is set: {name} is not supported ({reason}); start with torchrun --nproc-per-node N {TORCHRUN} RECIPE, "
                "and say --distributed fsdp to shard, or unset the variable"
            )


def idle_gpus() -> str | None:
    """A line for a run of one process on a machine of several GPUs."""
    gpus = torch.cuda.device_count()
    if ranks() > 1 or gpus < 2:
        return None
    return f"one of {gpus} GPUs is used; torchrun --nproc-per-node {gpus} {TORCHRUN} RECIPE uses all of them"
