"""How a batch is cut into chunks: by length, so that no chunk pays for the longest sample of the batch."""

from __future__ import annotations

from collections.abc import Sequence


def token_budget_chunks(lengths: Sequence[int], budget: int, *, max_rows: int | None = None) -> list[list[int]]:
    """Rows in chunks whose lengths add up to at most `budget`, longest rows first.

    Args:
        lengths: tokens per row, each at least 0.
        budget: most tokens a chunk may hold, at least 1. A row longer than the budget gets a chunk of its own.
        max_rows: most rows a chunk may hold.

    Returns:
        Lists of row indices; every row stands in exactly one. Chunks run from the longest rows to the shortest and
        ties keep the caller's order, so the result depends on nothing but the arguments.

    Raises:
        ValueError: for a budget or `max_rows` below one, or a negative length.
    """
    if budget < 1:
        raise ValueError(f"chunk_tokens: expected a budget of at least 1 token, got {budget}; pass a larger one")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows: expected at least 1 row a chunk, got {max_rows}; None leaves it out")
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths: expected 0 or more tokens a row, got {min(lengths)}; pass the tokens of each row")
    chunks: list[list[int]] = []
    filled = 0
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        full = bool(chunks) and max_rows is not None and len(chunks[-1]) >= max_rows
        if not chunks or full or filled + lengths[row] > budget:
            chunks.append([])
            filled = 0
        chunks[-1].append(row)
        filled += lengths[row]
    return chunks


def row_chunks(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Rows in chunks of `size`, longest rows first. See `token_budget_chunks`."""
    if size < 1:
        raise ValueError(f"chunk_size: expected at least 1 row a chunk, got {size}; raise it")
    return token_budget_chunks(lengths, max(1, sum(lengths)), max_rows=size)
