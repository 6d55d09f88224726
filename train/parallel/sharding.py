"""FSDP2: weights, gradients and optimizer state sharded over the ranks with `fully_shard`, and gathered for checkpoints.

The library's own launching shards a vision-language model in one group, or replicates it without a word on a CPU, so the
sharding is done here: one group for each block of the decoder and of the vision tower, one for what is left.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm2vec.checkpoint import adapters
from vlm2vec.model import VLM2Vec

from ..build import vision_is_frozen
from ..losses.learned import PREFIX


def shard(model: VLM2Vec, autocast: torch.dtype | None = None, mesh: torch.distributed.DeviceMesh | None = None) -> VLM2Vec:
    """Shards the model in place over all ranks.

    A sharded module's forward is collective, so chunks without visuals run the vision tower on a placeholder from here on
    (`VLM2Vec.always_vision`). A frozen tower is left whole on every rank instead: it needs no gradients and no optimizer,
    and runs only where there is something to see.

    Args:
        autocast: dtype of the gathered weights in the forward and backward; gradients are reduced in float32.
        mesh: default all ranks, on the accelerator where there is one.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if autocast is not None:
        policy = MixedPrecisionPolicy(param_dtype=autocast, reduce_dtype=torch.float32, cast_forward_inputs=False)
    vision_parameters: set[torch.nn.Parameter] = set()
    if vision_is_frozen(model):
        vision_parameters = set(model.backbone.vision_tower(model.model).parameters())
    for block in _blocks(model, vision_parameters):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=vision_parameters)
    model.always_vision = not vision_parameters and model.backbone.vision_tower(model.model) is not None
    return model


def _blocks(model: torch.nn.Module, vision_parameters: set[torch.nn.Parameter]) -> list[torch.nn.Module]:
    """The outermost members of the model's lists of layers."""
    blocks: list[torch.nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if not isinstance(module, torch.nn.ModuleList) or id(module) in inside:
            continue
        for block in module:
            parameters = list(block.parameters())
            if parameters and not vision_parameters.intersection(parameters):
                blocks.append(block)
                inside.update(id(m) for m in block.modules())
    return blocks


def is_sharded(model: torch.nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")


def gathered_weights(model: VLM2Vec) -> dict[str, torch.Tensor]:
    """Whole weights on the CPU of rank 0 (empty elsewhere); the adapter's alone where there is one. Collective."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    adapted = adapters.has_adapter(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapted)
    weights = get_model_state_dict(model, options=options)
    return {name: value for name, value in weights.items() if not name.startswith(PREFIX)}  # the loss's numbers lie in a file of their own


def gathered_optimizer(model: VLM2Vec, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's whole state by parameter name, on the CPU of rank 0. Collective."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def scatter_optimizer(model: VLM2Vec, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Gives every rank its shards of a state that `gathered_optimizer` made, for any number of ranks. Collective."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def gradient_norm(parameters: list[torch.nn.Parameter], clip: float) -> torch.Tensor:
    """Norm of the whole gradient over all ranks; scales the gradient down to `clip`. Collective.

    Parameters that are whole on every rank (a learned temperature) have equal gradients there, and count once.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    kinds = [[p for p in with_gradient if hasattr(p, "device_mesh") == is_sharded] for is_sharded in (True, False)]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds if kind]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        if kind:
            torch.nn.utils.clip_grads_with_norm_(kind, clip, norm)
    return norm


def group_apart(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    """Moves whole parameters into a group of their own: an optimizer's fused steps take no mixture of whole and sharded ones."""
    apart = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in apart]
        if moved and len(moved) < len(group["params"]):
            group["params"] = [p for p in group["params"] if id(p) not in apart]
            optimizer.add_param_group({**{name: value for name, value in group.items() if name != "params"}, "params": moved})
