"""What a loss learns besides the model: trained with it, kept in its checkpoints, and beside the weights of the trained model.

The loss's module becomes a part of the model, so that optimizer, clipping and averaging over the ranks take its parameters along;
the model's own weights are saved without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file

from .base import Loss

PREFIX = "trained_loss."
FILE = "loss.safetensors"


def attach(loss: Loss, model: torch.nn.Module, *, device: torch.device, dtype: torch.dtype) -> Callable:
    """The loss's function; a module of it that learns is now a part of the model.

    Args:
        dtype: of its parameters.
    """
    function = loss.function()
    if isinstance(function, torch.nn.Module):
        function.to(device, dtype)
        if loss.learns:
            model.add_module(PREFIX.rstrip("."), function)
    return function


def save(function: Callable, folder: str | os.PathLike) -> None:
    """Writes what the loss has learned into a model's folder; nothing where it learns nothing."""
    learned = _learned(function)
    if learned:
        save_file({name: parameter.detach().cpu().contiguous() for name, parameter in learned.items()}, os.path.join(folder, FILE))


def load(function: Callable, folder: str | os.PathLike) -> None:
    """Takes up what the loss had learned when a checkpoint was written.

    Raises:
        ValueError: the checkpoint holds nothing of it.
    """
    learned = _learned(function)
    if not learned:
        return
    path = os.path.join(folder, FILE)
    if not os.path.isfile(path):
        raise ValueError(f"{folder} has no {FILE}, in which the loss's own parameters are kept; remove the folder, or pass --fresh")
    saved = load_file(path)
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(saved[name].reshape(parameter.shape))  # older checkpoints hold numbers, 0-d


def _learned(function: Callable) -> dict[str, torch.nn.Parameter]:
    if not isinstance(function, torch.nn.Module):
        return {}
    return {name: parameter for name, parameter in function.named_parameters() if parameter.requires_grad}
