"""What a source of own data says, before its data is looked at."""

from __future__ import annotations

from vlm2vec.data.sides import check_sides

from .keys import Data, Source

_OF_PATH = ("query", "target", "negatives", "config", "encoding", "delimiter")


def check_own(source: Source, data: Data) -> None:
    """ValueError for keys that do not go together: what was expected, what is there, and the mend."""
    where = f"source {source.name}"
    if source.path is None:
        said = next((key for key in _OF_PATH if getattr(source, key) is not None), None)
        if said is not None:
            raise ValueError(f"{where}: expected path beside {said}, got none; say path: FILE, or leave {said} out")
        lacking = [f"data.{key}" for key in ("root", "images") if getattr(data, key) is None and getattr(source, key) is None]
        if lacking:
            raise ValueError(f"the recipe lacks {', '.join(lacking)}, which {where} needs; say where they are, or path: FILE in the source")
        return
    if not source.path.strip() or "\0" in source.path:
        raise ValueError(f"{where}: path must be the name of a file, a folder or a data set, got {source.path[:40]!r}")
    for key in ("root", "file"):
        if getattr(source, key) is not None:
            raise ValueError(f"{where}: path and {key} both say where its rows are; expected one of them: drop {key}")
    if source.format != "mmeb":
        raise ValueError(f"{where}: format {source.format} has its own columns, path says them by query and target; drop one of the two")
    try:
        check_sides(source.query, source.target, source.negatives)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if source.negatives is not None and not data.hard_negatives:
        raise ValueError(f"{where}: negatives are named, and data.hard_negatives is false, so none is used; say data.hard_negatives: true")
