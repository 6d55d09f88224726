"""Full checkpoints, merged tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlm2vec.checkpoint.merging import ties
from vlm2vec.checkpoint.merging.streams import Weights, require_alike, write_like

if TYPE_CHECKING:
    from vlm2vec.checkpoint.pretrained import Description


def merge_weights(
    models: list[str],
    described: list[Description],
    folder: Path,
    shares: list[float],
    method: str,
    base: str | None,
    density: float,
    scale: float,
) -> str:
    """Writes the merged weights into `folder`, in the first model's files and dtypes. Returns what they are, in words."""
    unused = described[0].backbone.unused_keys
    opened = [Weights(model, unused) for model in models]
    if method == "ties" and base is None:
        raise ValueError("method ties of full checkpoints: expected the base that all of them started from, got none; pass --base MODEL")
    if method != "ties" and base is not None:
        raise ValueError(f"base: expected method ties beside it, got {method} of full checkpoints, which needs none; leave base out")
    origin = Weights(base, unused) if base is not None else None
    for other in [*opened[1:], *([origin] if origin is not None else [])]:
        require_alike(opened[0], other)
    if origin is None:
        write_like(opened[0], folder, lambda name: _mean([weights.get(name) for weights in opened], shares))
    else:
        least = [ties.threshold(lambda w=weights: _changes(w, origin), density) for weights in opened]

        def make(name: str) -> torch.Tensor:
            start = origin.get(name)
            if not start.is_floating_point():
                return start
            wide = _wide(start)
            changes = [weights.get(name).to(wide) - start.to(wide) for weights in opened]
            return start.to(wide) + scale * ties.merged(changes, shares, least)

        write_like(opened[0], folder, make)
    return f"{len(models)} full checkpoints in one"


def _mean(tensors: list[torch.Tensor], shares: list[float]) -> torch.Tensor:
    if not tensors[0].is_floating_point():  # tables of positions and their like
        return tensors[0]
    wide = _wide(tensors[0])
    return sum(share * tensor.to(wide) for share, tensor in zip(shares, tensors, strict=True))


def _changes(weights: Weights, origin: Weights) -> Iterator[torch.Tensor]:
    for name in weights.shapes:
        start = origin.get(name)
        if start.is_floating_point():
            yield weights.get(name).to(_wide(start)) - start.to(_wide(start))


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
