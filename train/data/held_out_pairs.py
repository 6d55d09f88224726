"""The held-out rows of a recipe as files of pairs, for `vlm2vec eval MODEL --data RECIPE`: what training never sees."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vlm2vec.evaluation.loaders.pairs import FILE
from vlm2vec.files import write_bytes, write_lines
from vlm2vec.media.sampling import FRAMES

from ..recipe.checks import require_own_names
from ..recipe.schema import load_recipe
from .contents import film_digest, picture_digest
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
    written, known = [], {}
    for name, table, part in zip(names, tables, split(tables, names, recipe.held_out_rows)):
        rows = [part.row(position) for position in range(part.trained, part.trained + part.held)]
        if rows:
            write_lines(folder / name / FILE, (json.dumps(_pair(table, row, folder / "media", known)) for row in rows))
            written.append(name)
    if not written:
        raise ValueError(f"recipe {recipe_path}: no source is large enough to hold rows back (at most a tenth of it); give it more rows")
    return written


def _pair(table: SourceTable, row: int, media: Path, known: dict[bytes, str]) -> dict[str, Any]:
    try:
        query, target, _ = table.row(row, FRAMES)
        group = table.group_of(row) if table.group else None
    except Exception as error:  # as in training, a row of a wrong shape raises whatever comes
        return {"row": row, "error": f"{error}"}
    pair = {"row": row, "query": _filed(query, media, known, table.is_own), "target": _filed(target, media, known, table.is_own)}
    return pair | ({} if group is None else {"group": group})


def _filed(item: dict[str, Any], media: Path, known: dict[bytes, str], is_own: bool) -> dict[str, Any]:
    """An input all of whose media are paths; those of people's own tables one path for each content, so that copies are one candidate."""

    def path_of(source: Any, digest: Any) -> Any:
        if isinstance(source, list):
            return [path_of(one, digest) for one in source]
        is_bytes = isinstance(source, bytes)
        if not is_bytes and (not is_own or not os.path.isfile(source)):  # what is not there, a folder of frames, a data: URI
            return os.fspath(source)
        try:
            key = digest(source)
        except OSError:  # told when it is opened
            return os.fspath(source)
        path = known.setdefault(key, str(media / key.hex()) if is_bytes else os.fspath(source))
        if is_bytes and path == str(media / key.hex()) and not os.path.exists(path):
            write_bytes(Path(path), source, durable=False)
        return path

    kinds = {"image": picture_digest, "video": film_digest}
    return item | {kind: path_of(item[kind], digest) for kind, digest in kinds.items() if item.get(kind)}
