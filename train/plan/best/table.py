"""Tables of Markdown whose columns may be left out."""

from __future__ import annotations

from collections.abc import Sequence


class Table:
    """A table of Markdown.

    Args:
        columns: (name, whether it holds numbers, whether it is there) of each.

    Example:
        >>> table = Table(("recipe", False, True), ("hours", True, True), ("money", True, False))
        >>> print(*table.head(), table.row("my-recipe", "2.5", "6.25"), sep="\\n")
        | recipe | hours |
        |---|---:|
        | my-recipe | 2.5 |
    """

    def __init__(self, *columns: tuple[str, bool, bool]):
        self._columns = columns

    def head(self) -> list[str]:
        names = self.row(*(name for name, _, _ in self._columns))
        return [names, "|" + "|".join("---:" if is_number else "---" for _, is_number, is_there in self._columns if is_there) + "|"]

    def row(self, *cells: object) -> str:
        """A line; a cell for every column, those that are left out too."""
        there: Sequence[str] = [str(cell) for cell, (_, _, is_there) in zip(cells, self._columns, strict=True) if is_there]
        return f"| {' | '.join(there)} |"
