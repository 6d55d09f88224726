"""Saving: weights, processor files, settings; every file under a temporary name first."""

import json
import os
import shutil
import tempfile

from vlm2vec.loading import SETTINGS


def settings_of(model) -> dict:
    """What vlm2vec.json holds: enough to reload the model as it was trained."""
    from vlm2vec import __version__

    settings = {"vlm2vec": __version__, "family": model.family, "options": model.options, "prompts": model.prompts}
    return settings


def save(model, folder: str, *, merge: bool) -> None:
    """See `VLM2Vec.save_pretrained`. Nothing is left half-written: files are made beside and moved one by one."""
    folder = os.path.abspath(folder)
    os.makedirs(folder, exist_ok=True)
    work = tempfile.mkdtemp(prefix=".saving-", dir=os.path.dirname(folder))
    try:
        write_weights(model, work, merge=merge)
        model.processing.save(work)
        with open(os.path.join(work, SETTINGS), "w", encoding="utf-8") as f:
            json.dump(settings_of(model), f, indent=2, ensure_ascii=False)
            f.write("\n")
        for root, _, names in os.walk(work):
            target = os.path.join(folder, os.path.relpath(root, work))
            os.makedirs(target, exist_ok=True)
            for name in names:
                os.replace(os.path.join(root, name), os.path.join(target, name))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_weights(model, folder: str, *, merge: bool) -> None:
    """The module's weights in the hub's layout, config.json naming the class that transformers and vLLM expect."""
    config = model.model.config
    model.model.save_pretrained(folder)
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as f:
        written = json.load(f)
    if model.backbone.architecture:
        written["architectures"] = [model.backbone.architecture]
    with open(path, "w", encoding="utf-8") as f:
        json.dump(written, f, indent=2)
        f.write("\n")
