"""What every kind of table becomes: rows by number, named columns, and the folder where relative paths of media start."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

MOST_LISTED = 12  # columns that a message names
_LONGEST = 100  # characters of a name that is looked for in a whole file: what is longer is words


class Reader(Protocol):
    """The rows of one file or data set; may be pickled, and read by several processes."""

    def __len__(self) -> int: ...

    def read(self, row: int, columns: Sequence[str] | None) -> dict[str, Any]:
        """Values of a row by column, at least those of `columns` that it has (None: all). ValueError for what is no row."""


@dataclass(frozen=True)
class Table:
    """Rows of one source; `table[i]` gives the values of row i by column and opens no media.

    Attributes:
        column_names: in the order of the data. A value inside of another is named with a dot: `json.caption`.
        media: folder where relative paths of media start; None where they have no place of their own.
        left_out: a line for each part of a file that is no row of it, such as a CSV line of another number of cells.
        repeated: names that several columns bear.
        late: whether any row has a column that is none of `column_names`, where these are of the first rows; None: they are all.
        rows: those of the reader that are this table's; None for all. chosen: columns that are read; None for all.

    Example:
        >>> table = open_table("captions.csv")
        >>> table.column_names, len(table), table[0]["caption"]
        (['file', 'caption'], 2, 'a red shoe')
    """

    reader: Reader
    column_names: list[str]
    media: str | None
    left_out: tuple[str, ...] = ()
    repeated: frozenset[str] = frozenset()
    rows: Sequence[int] | None = None
    chosen: tuple[str, ...] | None = None
    late: Callable[[str], bool] | None = None

    def __len__(self) -> int:
        return len(self.reader) if self.rows is None else len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.reader.read(row if self.rows is None else self.rows[row], self.chosen)

    def select(self, rows: Sequence[int]) -> Table:
        """The table of these rows alone."""
        return replace(self, rows=rows if self.rows is None else [self.rows[row] for row in rows])

    def select_columns(self, names: Iterable[str]) -> Table:
        """The table of which no more than these columns, dotted names too, is read."""
        return replace(self, chosen=tuple(dict.fromkeys(self.top(name) for name in names)))

    def column(self, name: str) -> list[Any] | None:
        """A column's values in all rows, where its data lie column by column; None where rows have to be read one by one."""
        whole = getattr(self.reader, "column", None)
        if whole is None or name not in self.column_names:
            return None
        values = whole(self.top(name))
        return values if self.rows is None else [values[row] for row in self.rows]

    def has(self, name: str) -> bool:
        """Whether there is a column of this name, dotted or not."""
        return self._found(name) is not None

    def top(self, name: str) -> str:
        """The column that holds a named value: `json` of `json.caption`.

        Raises:
            ValueError: no such column (with the nearest), or several of that name.
        """
        found = self._found(name)
        if found is None:
            raise ValueError(f"no column {name!r}, {nearest(name, self.column_names)}")
        if found in self.repeated:
            raise ValueError(f"{self.column_names.count(found)} columns are named {found!r}; rename all but one of them")
        return found

    def _found(self, name: str) -> str | None:
        """The column that a name begins with; one that comes late in the data joins the others."""
        names = [name[:end] for end in _ends(name)]
        found = next((each for each in names if each in self.column_names), None)
        if found is None and self.late is not None and len(name) <= _LONGEST:
            found = next((each for each in names if self.late(each)), None)
            if found is not None:
                self.column_names.append(found)
        return found

    def value(self, values: dict[str, Any], name: str) -> Any:
        """The value of a row that `name` stands for; None where the row has none."""
        top = self.top(name)
        found = values.get(top)
        for part in name[len(top) + 1 :].split(".") if len(name) > len(top) else ():
            if found is not None and not isinstance(found, dict):
                raise ValueError(f"column {name!r}: {top!r} holds {type(found).__name__} values, in which there is no {part!r}")
            found = None if found is None else found.get(part)
        return found


def nearest(name: str, columns: Sequence[str]) -> str:
    """The columns that there are, and the nearest."""
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    shown = [" ".join(column.split()) for column in columns[:MOST_LISTED]]  # a file without names has rows in their place
    shown = [column if len(column) <= 40 else f"{column[:37]}..." for column in shown]
    more = f" and {len(columns) - MOST_LISTED} more" if len(columns) > MOST_LISTED else ""
    there = f"the data has {', '.join(shown) or 'no columns'}{more}"
    return f"{there}; did you mean {near[0]!r}?" if near else f"{there}; name one of these"


def _ends(name: str) -> list[int]:
    """Where a column's name may end in a dotted one, the longest first."""
    return [len(name), *(at for at in range(len(name) - 1, 0, -1) if name[at] == ".")]
