"""Saving: weights, processor files, settings; every file under a temporary name first."""

from __future__ import annotations

import json
import os
import re

from torch import nn

from vlm2vec.checkpoint import adapters
from vlm2vec.checkpoint import sentence_transformers_files as st_files
from vlm2vec.checkpoint.loading import SETTINGS, renamed
from vlm2vec.checkpoint.release import __version__
from vlm2vec.files import filling_folder, write_json

_STALE = re.compile(r"adapter_config\.json|adapter_model\.(safetensors|bin)|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def settings_of(model: nn.Module) -> dict:
    """What vlm2vec.json holds: enough to reload the model as it was trained."""
    settings = {"vlm2vec": __version__, "family": model.family, "options": model.options, "prompts": model.prompts}
    return settings


def save(model: nn.Module, folder: str, *, merge: bool, state: dict | None = None, st_description: bool = True) -> None:
    """See `VLM2Vec.save_pretrained`. Nothing is left half-written: files are written elsewhere and moved one by one.

    Args:
        st_description: describe the folder to sentence-transformers; False where that library writes its files itself.
    """
    full = merge or not adapters.has_adapter(model)
    with filling_folder(folder) as part:
        write_weights(model, os.fspath(part), merge=merge, state=state)
        model.processing.save(os.fspath(part))
        write_json(part / SETTINGS, settings_of(model))
        if st_description:
            st_files.write(model, os.fspath(part), full=full)
        written = set(os.listdir(part))
    if full:
        remove_stale(folder, written)


def remove_stale(folder: str, written: set[str]) -> None:
    """Take away what an earlier save left and a reload would prefer to the full model just written: an adapter, other shards.

    An adapter saved into a full model's folder removes nothing: the full model may be its base.
    """
    for name in os.listdir(folder):
        if name not in written and _STALE.fullmatch(name):
            os.remove(os.path.join(folder, name))


def write_weights(model: nn.Module, folder: str, *, merge: bool, state: dict | None = None) -> None:
    """Weights and config.json. With an adapter and merge=False only the adapter: the base stays where it is."""
    if adapters.has_adapter(model) and not merge:
        adapters.save(model, folder, state)
        return
    if state is None:
        plain = not adapters.has_adapter(model) and not getattr(model.model, "is_quantized", False)
        state = model.model.state_dict() if plain else adapters.merged_state(model)
    write_state(renamed(state, model.backbone.hub_names), folder)
    write_config(model, folder)


def write_state(state: dict, folder: str) -> None:
    """Safetensors shards of at most 5 GB with their index."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict({k: v.detach() for k, v in state.items()}, folder, max_shard_size="5GB", safe_serialization=True)


def write_config(model: nn.Module, folder: str) -> None:
    """config.json naming the class that transformers and vLLM expect for the family."""
    model.model.config.save_pretrained(folder)
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as f:
        written = json.load(f)
    written["architectures"] = [model.backbone.architecture or type(model.model).__name__]
    written["dtype"] = str(model.dtype).removeprefix("torch.")
    written.pop("quantization_config", None)
    remote = {
        name: place for name, place in (written.pop("auto_map", None) or {}).items() if "--" in str(place)
    }  # code beside the weights stays there
    if remote:
        written["auto_map"] = remote
    write_json(path, written)
