"""Texts made of columns: `Find: {caption}`. Braces that are meant as such are doubled."""

from __future__ import annotations

import difflib
import string
from dataclasses import dataclass
from typing import Any

from vlm2vec.data.tables import Table


@dataclass(frozen=True)
class Template:
    """Pieces of text and columns in turn: (text, column or None).

    Example:
        >>> template = parse("Find: {caption}", "query.text")
        >>> template.columns, template.filled({"caption": "a red shoe"}.get)
        (('caption',), 'Find: a red shoe')
    """

    pieces: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column for _, column in self.pieces if column is not None))

    @property
    def literal(self) -> bool:
        return not self.columns

    def filled(self, value: Any) -> str | None:
        """The text of a row, by `value(column)`; None where all of its columns are empty.

        Raises:
            ValueError: a column that holds no text or number.
        """
        found = {column: as_text(value(column), column) for column in self.columns}
        if found and not any(text.strip() for text in found.values()):
            return None
        return "".join(text + ("" if column is None else found[column]) for text, column in self.pieces)

    def with_column(self, column: str) -> Template:
        """The same words around another column."""
        return Template(tuple((text, None if old is None else column) for text, old in self.pieces))


def parse(text: str, where: str) -> Template:
    """A template as it is written in a recipe.

    Raises:
        ValueError: begins with `where`: a brace without its other, one without a column, or a format behind a column.
    """
    pieces = []
    try:
        for before, column, form, conversion in string.Formatter().parse(text):
            if column is not None and (not column.strip() or form or conversion):
                shown = f"{{{column}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}"
                raise ValueError(f"{where}: expected a column between braces, got {shown}; double braces that are text: {{{{ and }}}}")
            pieces.append((before, column))
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {error}, in {text[:60]!r}; double braces that are text: {{{{ and }}}}") from None
    return Template(tuple(pieces))


def column_or_template(text: str, table: Table, where: str) -> Template:
    """What stands as the text of a side: a column by its name, a template, or words that are the same for all rows.

    Raises:
        ValueError: words that seem to be meant for a column.
    """
    if table.has(text):
        return Template((("", text),))
    template = parse(text, where)
    if template.literal and text.strip():
        columns = table.column_names
        near = difflib.get_close_matches(text.strip(), columns, n=1, cutoff=0.8)
        if near or not any(c.isspace() for c in text) and text[-1].isalnum():
            hint = f"did you mean {near[0]!r}?" if near else f"the data has {', '.join(columns[:12])}."
            raise ValueError(
                f"{where}: {text[:60]!r} is no column, and a single word is taken for one; {hint} One for all rows ends with a full stop"
            )
    return template


def as_text(value: Any, column: str) -> str:
    """A cell as text: texts as they are, numbers as they print, nothing as "".

    Raises:
        ValueError: lists, objects, bytes.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, dict, bytes, bytearray)):
        kind = {list: "a list", tuple: "a list", dict: "an object"}.get(type(value), "bytes")
        raise ValueError(f"column {column!r}: expected a text, got {kind}; name a value in it, or write one row a text")
    return str(value)
