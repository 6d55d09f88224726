"""The held-out rows of a recipe as files of pairs, for `vlm2vec eval MODEL --data RECIPE`: what training never sees."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vlm2vec.evaluation.loaders.pairs import FILE
from vlm2vec.files import write_bytes, write_lines
from vlm2vec.media.sampling import FRAMES

from ..recipe.checks import require_own_names
from ..recipe.schema import load_recipe
from .groups import split
from .sources import SourceTable, open_source


def write_held_out(recipe_path: str, folder: Path) -> list[str]:
    """Writes FOLDER/SOURCE/pairs.jsonl of each source that holds rows back; pictures and films that have no file go to FOLDER/media.

    Returns:
        Names of the sources that do.

    Raises:
        ValueError: a recipe without `held_out`, or none of whose sources is large enough to hold rows back.
    """
    recipe = load_recipe(recipe_path)
    if not recipe.held_out_rows:
        raise ValueError(f"recipe {recipe_path} holds no rows back to evaluate on; say held_out: {{rows: 128, steps: 100}} and train again")
    require_own_names(recipe.data.sources, "vlm2vec eval")
    tables = [open_source(recipe.data, source) for source in recipe.data.sources]
    names = [source.name for source in recipe.data.sources]
    written = []
    for name, table, part in zip(names, tables, split(tables, names, recipe.held_out_rows)):
        rows = [part.row(position) for position in range(part.trained, part.trained + part.held)]
        if rows:
            write_lines(folder / name / FILE, (json.dumps(_pair(table, row, folder / "media")) for row in rows))
            written.append(name)
    if not written:
        raise ValueError(f"recipe {recipe_path}: no source is large enough to hold rows back (at most a tenth of it); give it more rows")
    return written


def _pair(table: SourceTable, row: int, media: Path) -> dict[str, Any]:
    try:
        query, target, _ = table.row(row, FRAMES)
        group = table.group_of(row) if table.group else None
    except Exception as error:  # as in training, a row of a wrong shape raises whatever comes
        return {"row": row, "error": f"{error}"}
    return {"row": row, "query": _filed(query, media), "target": _filed(target, media)} | ({} if group is None else {"group": group})


def _filed(value: Any, media: Path) -> Any:
    """An input all of whose media are paths."""
    if isinstance(value, dict):
        return {name: _filed(inner, media) for name, inner in value.items()}
    if isinstance(value, list):
        return [_filed(inner, media) for inner in value]
    if isinstance(value, bytes):
        path = media / hashlib.blake2b(value, digest_size=16).hexdigest()
        if not path.exists():
            write_bytes(path, value, durable=False)
        return str(path)
    return str(value) if isinstance(value, Path) else value
