"""What a run learns from, in few bytes: a changed base model or data set is noticed before an old run is taken for a new one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..recipe.schema import Recipe
from .sources import open_source

_EDGE = 1 << 16  # bytes read at either end of a file of weights: reading 16 GB would take longer than noticing is worth


def fingerprints(recipe: Recipe) -> dict[str, str]:
    """{"model": digest, "data.NAME": digest, ...}; a model that is no local folder has none.

    A model's digest covers its configuration and tokenizer whole and both ends of its weights; a source's covers its length
    and its first, middle and last row.
    """
    digests = {}
    folder = Path(recipe.model)
    if folder.is_dir():
        digest = hashlib.sha256()
        for file in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
            digest.update(file.name.encode() + _content(file))
        digests["model"] = digest.hexdigest()
    for source in recipe.data.sources:
        table = open_source(recipe.data, source)
        rows = [table.shown(at) for at in sorted({0, len(table) // 2, len(table) - 1})] if len(table) else []
        digests[f"data.{source.name}"] = hashlib.sha256(repr((len(table), rows)).encode()).hexdigest()
    return digests


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names of what both know and know differently."""
    return [name for name, digest in now.items() if before.get(name, digest) != digest]


def _content(file: Path) -> bytes:
    if file.suffix == ".json":
        return file.read_bytes()
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(_EDGE)
        opened.seek(max(0, size - _EDGE))
        return str(size).encode() + start + opened.read()
