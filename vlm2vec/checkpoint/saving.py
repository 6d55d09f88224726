"""Saving: weights, processor files, settings; every file under a temporary name first."""

import json
import os
import re
import shutil
import tempfile

from vlm2vec.checkpoint import adapters
from vlm2vec.checkpoint import sentence_transformers_files as st_files
from vlm2vec.checkpoint.loading import SETTINGS, renamed

_STALE = re.compile(r"adapter_config\.json|adapter_model\.(safetensors|bin)|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def settings_of(model) -> dict:
    """What vlm2vec.json holds: enough to reload the model as it was trained."""
    from vlm2vec import __version__

    settings = {"vlm2vec": __version__, "family": model.family, "options": model.options, "prompts": model.prompts}
    return settings


def save(model, folder: str, *, merge: bool, state: dict | None = None) -> None:
    """See `VLM2Vec.save_pretrained`. Nothing is left half-written: files are made beside and moved one by one."""
    folder = os.path.abspath(folder)
    os.makedirs(folder, exist_ok=True)
    work = tempfile.mkdtemp(prefix=".saving-", dir=os.path.dirname(folder))
    try:
        write_weights(model, work, merge=merge, state=state)
        model.processing.save(work)
        with open(os.path.join(work, SETTINGS), "w", encoding="utf-8") as f:
            json.dump(settings_of(model), f, indent=2, ensure_ascii=False)
            f.write("\n")
        st_files.write(model, work, full=merge or not adapters.has_adapter(model))
        kept = set(os.listdir(work))
        for root, _, names in os.walk(work):
            target = os.path.join(folder, os.path.relpath(root, work))
            os.makedirs(target, exist_ok=True)
            for name in names:
                os.replace(os.path.join(root, name), os.path.join(target, name))
        if merge or not adapters.has_adapter(model):
            remove_stale(folder, kept)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_stale(folder: str, kept: set[str]) -> None:
    """Take away what an earlier save left and a reload would prefer to the full model just written: an adapter, other shards.

    An adapter saved into a full model's folder removes nothing: the full model may be its base.
    """
    for name in os.listdir(folder):
        if name not in kept and _STALE.fullmatch(name):
            os.remove(os.path.join(folder, name))


def write_weights(model, folder: str, *, merge: bool, state: dict | None = None) -> None:
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


def write_config(model, folder: str) -> None:
    """config.json naming the class that transformers and vLLM expect for the family."""
    model.model.config.save_pretrained(folder)
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as f:
        written = json.load(f)
    written["architectures"] = [model.backbone.architecture or type(model.model).__name__]
    written["dtype"] = str(model.dtype).removeprefix("torch.")
    written.pop("quantization_config", None)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(written, f, indent=2)
        f.write("\n")
