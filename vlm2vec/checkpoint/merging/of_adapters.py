"""Adapters of one base: plain LoRA's mean is an adapter again, everything else a full model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm2vec.checkpoint import adapters, loading
from vlm2vec.checkpoint.merging import ties
from vlm2vec.checkpoint.merging.beside import copy_beside
from vlm2vec.files import write_json

if TYPE_CHECKING:
    from vlm2vec.checkpoint.pretrained import Description


def merge_adapters(
    models: list[str],
    described: list[Description],
    load: Callable[..., Any],
    folder: Path,
    shares: list[float],
    method: str,
    density: float,
    scale: float,
) -> str:
    """Writes the merged model into `folder`. Returns what it is, in words."""
    bases = [os.path.realpath(one.weights) if os.path.isdir(one.weights) else one.weights for one in described]
    for model, base in zip(models[1:], bases[1:]):
        if base != bases[0]:
            raise ValueError(
                f"expected adapters of one base, got {models[0]} on {described[0].weights} and {model} on {base}; pass base= where both "
                "names mean the same model"
            )
    tensors = [adapters.own_names(one.backbone, adapters.read_tensors(model)) for model, one in zip(models, described)]
    for model, held in zip(models[1:], tensors[1:]):
        _require_alike(models[0], tensors[0], model, held)
    if method == "linear" and all(_is_plain(one.adapter, held) for one, held in zip(described, tensors)):
        return _joined(models, described, tensors, folder, shares)
    del tensors
    return _full(models, described, load, folder, shares, method, density, scale)


def _require_alike(first: str, one: dict[str, torch.Tensor], other: str, two: dict[str, torch.Tensor]) -> None:
    for (name_a, a), (name_b, b) in (((first, one), (other, two)), ((other, two), (first, one))):
        lacking = [name for name in a if name not in b]
        if lacking:
            raise ValueError(
                f"expected the same layers in {name_a} and {name_b}, got {len(lacking)} tensors that {name_b} lacks: "
                f"{loading.some(lacking)}; merge adapters of the same targets, or fold each into its base first"
            )
    for name, tensor in one.items():
        other_shape, rank = two[name].shape, 0 if ".lora_A" in name or ".lora_embedding_A" in name else 1
        same = [side for side in range(tensor.dim()) if side != rank or ".lora_magnitude" in name]
        if tensor.dim() != two[name].dim() or any(tensor.shape[side] != other_shape[side] for side in same):
            raise ValueError(
                f"expected layers of the same shapes in {first} and {other}, got {name} of {tuple(tensor.shape)} and {tuple(other_shape)}; "
                "are they of one base?"
            )


def _is_plain(settings: dict, tensors: dict[str, torch.Tensor]) -> bool:
    """LoRA of linear layers, one rank and one scaling for all."""
    odd = any(settings.get(name) for name in ("rank_pattern", "alpha_pattern", "use_dora"))
    return not odd and all(name.endswith((".lora_A.weight", ".lora_B.weight")) and t.dim() == 2 for name, t in tensors.items())


def _joined(
    models: list[str], described: list[Description], tensors: list[dict[str, torch.Tensor]], folder: Path, shares: list[float]
) -> str:
    """B A of the merged adapter is the weighed sum of the B A of all: ranks lie side by side, weights and scalings in B."""
    from safetensors.torch import save_file

    out: dict[str, torch.Tensor] = {}
    for name in tensors[0]:
        if ".lora_A" in name:
            out[name] = torch.cat([held[name].float() for held in tensors])
        else:
            scaled = [s * _scaling(one.adapter) * held[name].float() for s, one, held in zip(shares, described, tensors)]
            out[name] = torch.cat(scaled, dim=1)
    rank = sum(int(one.adapter["r"]) for one in described)
    named = {f"{adapters.PREFIX}model.{name}": value.contiguous() for name, value in out.items()}
    copy_beside(models[0], folder)
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings: dict[str, Any] = {**described[0].adapter, "r": rank, "lora_alpha": rank, "use_rslora": False}
    write_json(folder / "adapter_config.json", settings, sort_keys=True, durable=False)
    return f"an adapter of rank {rank} of {len(models)} adapters"


def _scaling(settings: dict) -> float:
    rank = settings["r"]
    return settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)


def _full(
    models: list[str],
    described: list[Description],
    load: Callable[..., Any],
    folder: Path,
    shares: list[float],
    method: str,
    density: float,
    scale: float,
) -> str:
    """The base with the merged changes added. Changes of each adapter wait on the disk; one base is in memory at a time."""
    from safetensors.torch import save_file

    whole = next((model for model, one in zip(models, described) if any(one.adapter.get(name) for name in adapters.WHOLE)), None)
    if whole is not None:
        raise ValueError(
            f"{whole} holds modules or rows of its base whole; expected LoRA or DoRA alone: fold each adapter into its base "
            "(save_pretrained(folder, merge=True)) and merge these, with base="
        )
    with tempfile.TemporaryDirectory(prefix=".merging-", dir=folder.parent) as work:
        for at in reversed(range(len(models))):  # the first one's model stays, with its words and options
            model = layers = None  # before the next one is loaded
            model = load(models[at], base=described[at].weights, device="cpu")
            layers = adapters.lora_layers(model)
            save_file(
                {name: adapters.change(layer).contiguous() for name, layer in layers.items()}, os.path.join(work, f"{at}.safetensors")
            )
        changes = [_Changes(os.path.join(work, f"{at}.safetensors")) for at in range(len(models))]
        least = [ties.threshold(held.all, density) for held in changes] if method == "ties" else []
        with torch.no_grad():
            for name, layer in layers.items():
                own = [held.get(name) for held in changes]
                if method == "ties":
                    added = scale * ties.merged(own, shares, least)
                else:
                    added = sum(share * change for share, change in zip(shares, own, strict=True))
                weight = layer.get_base_layer().weight
                weight.copy_((weight.to(added.dtype) + added).to(weight.dtype))
        adapters.drop(model)
        model.save_pretrained(folder)
    return f"a full model of {len(models)} adapters"


class _Changes:
    def __init__(self, path: str):
        from safetensors import safe_open

        self._file = safe_open(path, "pt")

    def get(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def all(self) -> Iterator[torch.Tensor]:
        for name in self._file.keys():
            yield self.get(name)
