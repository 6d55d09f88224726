"""Queries, targets and negatives of a table's own columns: what a recipe says of them, and the inputs that rows become.

query: caption                                              a column of texts
target: {text: "Photo of {name}", image: file, video: clip} words around columns, pictures and films
negatives: [{image: other}]                                 or columns, or one column that holds a list
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm2vec.data.tables import Table
from vlm2vec.data.templates import Template, column_or_template, parse
from vlm2vec.files.documents import shown
from vlm2vec.inputs import MARKER, MODALITIES, VISUAL_KEYS
from vlm2vec.media.sources import is_data_uri, is_source_dict, is_url

KEYS = (*MODALITIES, "instruction")
_KINDS = {"image": "picture", "video": "film"}


@dataclass(frozen=True)
class Side:
    """One side of a row. Columns of several pictures are those that are there, in their order."""

    text: Template | None = None
    instruction: Template | None = None
    image: tuple[str, ...] = ()
    video: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        templates = [template for template in (self.text, self.instruction) if template is not None]
        return tuple(dict.fromkeys([*(c for t in templates for c in t.columns), *self.image, *self.video]))

    @property
    def marked(self) -> list[str]:
        """Kinds of media whose place the words of the text say."""
        words = "".join(text for text, _ in self.text.pieces) if self.text is not None else ""
        return sorted({kind for kind, _ in MARKER.findall(words)})

    def item(self, value: Callable[[str], Any], media: str | None) -> dict[str, Any] | None:
        """The input of a row; None where all of the side's columns are empty.

        Args:
            value: of a column. media: folder where relative paths start.

        Raises:
            ValueError: a cell that is no text, picture or film; a marker in the text for a picture or film that is not there.
        """
        text = None if self.text is None else self.text.filled(value)
        item: dict[str, Any] = {"text": text or "", "image": None}
        for kind in ("image", "video"):
            found = [one for column in getattr(self, kind) for one in _media(value(column), column, media, kind)]
            if found:
                item[kind] = found[0] if len(found) == 1 else found
        words = self.text is not None and self.text.literal
        if not item["image"] and not item.get("video") and (text is None or words and self.columns or not item["text"].strip()):
            return None
        for kind in self.marked:
            if not item.get(kind):
                columns = ", ".join(map(repr, getattr(self, kind)))
                raise ValueError(f"column {columns}: empty, and the text says where its {_KINDS[kind]} stands; fill it or remove the row")
        if self.instruction is not None and (instruction := self.instruction.filled(value)) is not None:
            item["instruction"] = instruction
        return item


@dataclass(frozen=True)
class Columns:
    """The sides of a table's rows. `convert` makes inputs of a row; it opens nothing."""

    table: Table
    query: Side
    target: Side
    negatives: tuple[Side, ...]
    media: str | None

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c for side in (self.query, self.target, *self.negatives) for c in side.columns))

    def convert(self, values: dict[str, Any], images: str, frames: int | None) -> tuple[dict, dict, list[dict]]:
        """(query, target, negatives) of a row's values.

        Raises:
            ValueError: an empty query or target, or a cell of the wrong kind; names its column.
        """

        def value(column: str) -> Any:
            return self.table.value(values, column)

        sides = []
        for name, side in (("query", self.query), ("target", self.target)):
            item = side.item(value, self.media)
            if item is None:
                raise ValueError(f"{name}: empty, in {', '.join(map(repr, side.columns))}; fill one of them or remove the row")
            sides.append(item)
        negatives = [item for side in self.negatives for item in _each(side, value, self.media)]
        return sides[0], sides[1], negatives


def columns_of(table: Table, query: Any, target: Any, negatives: Any, images: str | None) -> Columns:
    """What a recipe says of a source's sides, held against its table.

    Args:
        images: folder where relative paths start, in place of the table's own.

    Raises:
        ValueError: a column that is not there (with the nearest), one that several share, a text that is neither.
    """
    sides = {where: read_side(each, table, where) for each, where in ((query, "query"), (target, "target"))}
    against = {where: _negative(each, sides["target"], table, where) for where, each in _listed(negatives)}
    for where, side in {**sides, **against}.items():
        for column in side.columns:
            try:
                table.top(column)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
    return Columns(table, *sides.values(), tuple(against.values()), images or table.media)


def read_side(told: Any, table: Table | None, where: str) -> Side:
    """A side as a recipe says it; `table` None: the data is not at hand, and only the form is checked.

    Raises:
        ValueError: begins with `where`.
    """
    if isinstance(told, str) and told.strip():
        return Side(text=Template((("", told),)) if "{" not in told or table is not None and table.has(told) else parse(told, where))
    if not isinstance(told, dict) or not told:
        raise ValueError(f"{where}: expected a column, or some of {', '.join(KEYS)} with theirs, got {shown(told)}")
    for key, value in told.items():
        if key not in KEYS:
            known = f"did you mean {key[:-1]}?" if isinstance(key, str) and key[:-1] in VISUAL_KEYS else f"there are {', '.join(KEYS)}"
            raise ValueError(f"{where}: unknown key {shown(key)}; {known}")
        several = key in ("image", "video") and isinstance(value, list) and value and all(isinstance(one, str) for one in value)
        if not several and not isinstance(value, str):
            raise ValueError(f"{where}.{key}: expected the name of a column, got {shown(value)}")
    if not any(told.get(key) for key in MODALITIES):
        raise ValueError(f"{where}: expected a text, an image or a video among its keys, got {', '.join(map(str, told))}")
    templates = {}
    for key in ("text", "instruction"):
        if told.get(key):
            at = f"{where}.{key}"
            templates[key] = parse(told[key], at) if table is None else column_or_template(told[key], table, at)
    visuals = {key: tuple(told[key]) if isinstance(told[key], list) else (told[key],) for key in ("image", "video") if told.get(key)}
    side = Side(**templates, **visuals)
    for kind in side.marked:
        if not getattr(side, kind):
            raise ValueError(f"{where}: its text says where a {_KINDS[kind]} stands, and no column of {kind}s is named; say {kind}: COLUMN")
    return side


def check_sides(query: Any, target: Any, negatives: Any) -> None:
    """ValueError for what no table could give: what a recipe says before its data is looked at."""
    for told, where in ((query, "query"), (target, "target")):
        if told is None:
            raise ValueError(f"expected what its {where} is, got none; say {where}: COLUMN, or {where}: {{text: ..., image: ...}}")
        read_side(told, None, where)
    for where, told in _listed(negatives):
        read_side(told, None, where)


def _listed(negatives: Any) -> list[tuple[str, Any]]:
    if negatives is None:
        return []
    if isinstance(negatives, list):
        return [(f"negatives[{at}]", each) for at, each in enumerate(negatives)]
    return [("negatives", negatives)]


def _negative(told: Any, target: Side, table: Table, where: str) -> Side:
    """A negative; one that is a column alone is shown as the target is, and one without a text gets the target's words."""
    if not isinstance(told, str) or "{" in told and not table.has(told):
        side = read_side(told, table, where)
        words = target.text is not None and target.text.literal and "text" not in told
        return replace(side, text=target.text) if side.text is None and words else side
    if len(target.columns) != 1:
        raise ValueError(f"{where}: expected {{text: ..., image: ...}}, since the target is made of several columns, got {told!r}")
    if target.image or target.video:
        return replace(target, **{kind: (told,) for kind in ("image", "video") if getattr(target, kind)})
    return replace(target, text=target.text.with_column(told))


def _each(side: Side, value: Callable[[str], Any], media: str | None) -> Iterator[dict[str, Any]]:
    """The negatives of a row: one, or as many as its columns' lists are long. Empty ones are none."""
    lists = {column: found for column in side.columns if isinstance(found := _cell(value(column)), list)}
    if len({len(found) for found in lists.values()}) > 1:
        lengths = ", ".join(f"{column!r} has {len(found)}" for column, found in lists.items())
        raise ValueError(f"negatives: expected lists of one length, got {lengths}")
    for at in range(max(map(len, lists.values()), default=1) if lists else 1):
        item = side.item(lambda column, at=at: lists[column][at] if column in lists else value(column), media)
        if item is not None:
            yield item


def _cell(value: Any) -> Any:
    """A cell of a CSV that holds a list, as JSON writes one; others as they are."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, str) and value[:1] == "[" and value.rstrip()[-1:] == "]":
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, list) else value
    return value


def _media(value: Any, column: str, media: str | None, kind: str) -> list[Any]:
    """The pictures or films of a cell as `vlm2vec.inputs` takes them: paths from `media`, bytes; [] for an empty one."""
    value = _cell(value)
    if isinstance(value, list):
        found = [one for each in value for one in _media(each, column, media, kind)]
        is_film = kind == "video" and all(isinstance(one, str) and _is_frame(one) for one in found)
        return [found] if found and is_film else found  # files of pictures in one cell are the frames of one film
    if value is None or isinstance(value, str) and not value.strip():
        return []
    if is_source_dict(value):
        content = value.get("bytes")
        return [bytes(content)] if content is not None else _media(value.get("path"), column, media, kind)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return [bytes(value)] if len(value) else []
    if isinstance(value, Path):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r}: expected the file of a {_KINDS[kind]}, or its bytes, got {shown(value)}")
    if is_data_uri(value):
        return [value]
    name = value.strip()
    if is_url(name):
        raise ValueError(f"column {column!r}: {name[:100]} is a URL, and training reads files; download the {_KINDS[kind]}s first")
    if "\0" in name:
        raise ValueError(f"column {column!r}: a file's name holds no null character, got {shown(name)}")
    if not os.path.isabs(name) and media is None:
        raise ValueError(f"column {column!r}: {name[:100]!r} is a relative path; say images: FOLDER, where such paths start")
    return [os.path.normpath(name if os.path.isabs(name) else os.path.join(media, name))]


def _is_frame(name: str) -> bool:
    from vlm2vec.media.endings import PICTURES

    return name.lower().endswith(PICTURES)
