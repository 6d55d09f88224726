"""How a model is fed: raw, as VLM2Vec trains, or as the authors of a published embedder do. What a folder or a name tells of it."""

from __future__ import annotations

import os
import re
from typing import Any

from vlm2vec.backbones import AUTHORS, Embedder
from vlm2vec.checkpoint import loading
from vlm2vec.files.documents import parse_json, read_text


def feeding_of(family: str | None, sources: dict[str, dict | None], settings: dict, options: dict) -> str:
    """ "raw" or "authors": what the caller asks for, else what vlm2vec.json says, else what name and files tell.

    Args:
        family: model_type of config.json.
        sources: folders or hub names of the model (an adapter, its base) and the hub options (a revision) of each; None
            where the name alone is known.
        settings: vlm2vec.json; a model that was saved before there was a choice is fed raw.
        options: the caller's family options.
    """
    if "feeding" in options:
        return options["feeding"]
    if settings.get("options"):
        return settings["options"].get("feeding", "raw")
    embedder = AUTHORS.get(family)
    return "authors" if embedder is not None and any(tells(embedder, source, hub) for source, hub in sources.items()) else "raw"


def saved_options(settings: dict, feeding: str) -> dict:
    """The options of vlm2vec.json; none of them where the model is to be fed otherwise than it was saved."""
    saved = settings.get("options") or {}
    return saved if saved.get("feeding", "raw") == feeding else {}


def tells(embedder: Embedder, source: str, hub: dict[str, Any] | None) -> bool:
    """Whether a folder or hub repository is this embedder, by its name, sentence-transformers' files or its vocabulary."""
    if re.match(embedder.names, os.path.basename(source.rstrip("/")).lower()):
        return True
    if hub is None:
        return False
    if embedder.modules is not None:
        path = _file(source, "modules.json", hub)
        modules = [] if path is None else parse_json(read_text(path), path, " is not valid JSON")
        kinds = [m.get("type") for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
        if any(isinstance(kind, str) and re.match(embedder.modules, kind) for kind in kinds):
            return True
    if embedder.token is not None:
        files = (_file(source, name, hub) for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"))
        return any(path is not None and f'"{embedder.token}"' in read_text(path) for path in files)
    return False


def _file(source: str, name: str, hub: dict[str, Any]) -> str | None:
    """A file that only tells; without a way to the hub it is as if the repository had none."""
    try:
        return loading.file_of(source, name, **hub)
    except ValueError:
        if os.path.isdir(source):
            raise
        return None
