"""The end of a decoder on last tokens alone: an embedding is one row of a sample, and no other row of the last norm and MLP is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class NormOfRows(nn.Module):
    """A decoder's final norm on the rows (B,) it is asked for: (1, T, D) -> (1, B, D)."""

    def __init__(self, norm: nn.Module, index: torch.Tensor):
        super().__init__()
        self.norm, self.index = norm, index

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden.index_select(1, self.index))


class LayerOfRows(nn.Module):
    """The last decoder layer, whose MLP sees the rows (B,) alone: (1, T, D) -> (1, B, D).

    Attention needs the keys and values of all tokens; the MLP, two thirds of a layer's weights and more, no row that is not asked for.
    """

    def __init__(self, layer: nn.Module, index: torch.Tensor):
        super().__init__()
        self.layer, self.index = layer, index

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        layer = self.layer
        mixed, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        hidden = hidden_states.index_select(1, self.index) + mixed.index_select(1, self.index)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def ending_at_rows(text: nn.Module, index: torch.Tensor, *, plain_last_layer: bool = False) -> nn.Module:
    """The decoder with its end on the rows (B,) alone: a view of the same layers for one call. The decoder itself, which other threads
    may be using, stays as it is; a hook on its norm would reach into their calls.

    Args:
        plain_last_layer: the last layer is attention and MLP, each behind its norm and beside a residual, and nothing follows it but the
            norm. In inference mode its MLP then runs on these rows alone, unless somebody has hooked or replaced the layer; products of
            fewer rows may round otherwise, and elsewhere the bits stay.
    """
    modules = dict(text._modules)
    if plain_last_layer and not text.training and torch.is_inference_mode_enabled() and _untouched(text.layers[-1]):
        modules["layers"] = nn.ModuleList([*text.layers[:-1], LayerOfRows(text.layers[-1], index)])
        modules["norm"] = text.norm
    else:
        modules["norm"] = NormOfRows(text.norm, index)
    view = object.__new__(type(text))
    view.__dict__.update(text.__dict__, _modules=modules)
    return view


def _untouched(layer: nn.Module) -> bool:
    """No hook (of a sharded or offloaded layer, of an observer) and no other `forward` would be left out."""
    return not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
