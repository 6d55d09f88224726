"""CLIP towers as Phi-3.5-V and LLaVA-Next use them: the patches of one inner layer, nothing beyond it computed."""

import torch
from torch import nn


def inner(clip: nn.Module) -> nn.Module:
    """The module that holds `embeddings` and `encoder`; transformers before 5.2 kept it one level down."""
    return getattr(clip, "vision_model", clip)


def is_clip(tower: nn.Module) -> bool:
    """Whether `hidden_states` can walk this tower."""
    return all(hasattr(inner(tower), part) for part in ("embeddings", "pre_layrnorm", "encoder"))


def hidden_states(clip: nn.Module, pixels: torch.Tensor, layers: list[int]) -> list[torch.Tensor]:
    """Hidden states of the given layers, each (N, 1 + patches, width), class token first.

    Args:
        clip: a CLIP vision model.
        pixels: (N, 3, H, W) normalised; cast to the tower's dtype.
        layers: as transformers counts them: 0 is the input of the first layer, -1 the output of the last.

    Raises:
        ValueError: a layer that the tower does not have.
    """
    model = inner(clip)
    depth = len(model.encoder.layers)
    wanted = [i + depth + 1 if i < 0 else i for i in layers]
    if not all(0 <= i <= depth for i in wanted):
        raise ValueError(f"vision feature layers {layers}: the tower has {depth} layers, expected {-depth - 1} to {depth}")
    hidden = model.pre_layrnorm(model.embeddings(pixels.to(model.embeddings.patch_embedding.weight.dtype)))
    by_layer = {0: hidden}
    for i in range(max(wanted)):
        out = model.encoder.layers[i](hidden, None)
        hidden = by_layer[i + 1] = out[0] if isinstance(out, tuple) else out
    return [by_layer[i] for i in wanted]
