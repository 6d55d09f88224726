"""What a step may be asked: bounds that bound, and a length for every row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch

from .chunks import SIDES


def check_bounds(*, chunk_tokens: Any, chunk_size: Any, retain_mib: Any, keep_mib: Any) -> None:
    """Refuses counts below 1 and bounds that are negative or NaN, which no memory would ever be above; None is no bound."""
    for name, value in (("chunk_tokens", chunk_tokens), ("chunk_size", chunk_size)):
        if value is not None and not (isinstance(value, Integral) and not isinstance(value, bool) and value >= 1):
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}; raise it")
    for name, value in (("retain_mib", retain_mib), ("keep_mib", keep_mib)):
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number and not math.isnan(value) and value >= 0 or value is None and name == "retain_mib"):
            raise ValueError(f"{name}: expected MiB of at least 0, got {value!r}; 0 keeps nothing")


def side_lengths(sides: Sequence[Any], lengths: Sequence[Sequence[int]] | None, *, needed: bool) -> tuple[list[int], ...]:
    """Tokens of every row by side, as given, or 1 a row where they may be left out.

    Args:
        sides: the inputs of each side. needed: chunks are cut by tokens.

    Raises:
        ValueError: no lengths where they are needed or rows cannot be counted; too few or too many of them, by the rows that the
            sides say; lengths that are no counts.
    """
    names = SIDES[: len(sides)]
    counted = [rows_of(side) for side in sides]
    if lengths is None:
        if needed:
            raise ValueError("lengths: expected the tokens of each row beside chunk_tokens, got None; pass them, or cut by chunk_size")
        for name, count in zip(names, counted):
            if count is None:
                raise ValueError(
                    f"lengths: expected them for {name}, whose rows cannot be counted, got None; pass a length for each row, 1 will do"
                )
        return tuple([1] * count for count in counted)
    if len(lengths) != len(sides):
        raise ValueError(f"lengths: expected a sequence for each of {', '.join(names)}, got {len(lengths)}; pass one a side")
    checked = []
    for name, given, count in zip(names, lengths, counted):
        values = given.tolist() if isinstance(given, torch.Tensor) else list(given)
        odd = next((row for row, value in enumerate(values) if not (isinstance(value, Integral) and value >= 0)), None)
        if odd is not None:
            raise ValueError(f"lengths: expected 0 or more tokens a row, got {values[odd]!r} for row {odd} of {name}; pass its tokens")
        # packed sides have as many rows as tokens
        if count is not None and count not in (len(values), sum(values)):
            raise ValueError(
                f"lengths: expected one for each of the {count} rows of {name}, got {len(values)}; without one a row would be dropped"
            )
        checked.append([int(value) for value in values])
    return tuple(checked)


def rows_of(side: Any) -> int | None:
    """Rows of a side: of a tensor, of tensors in a dictionary, tuple or list where they agree, else a list's `len`.

    None where nothing says them.
    """
    if isinstance(side, torch.Tensor):
        return len(side) if side.dim() else None
    if not isinstance(side, (Mapping, list, tuple)):
        return None
    values = list(side.values()) if isinstance(side, Mapping) else list(side)
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.dim()]
    if isinstance(side, list) and len(tensors) < len(values):
        return len(side)  # texts, pictures, features: one a row
    counts = {len(value) for value in tensors}
    return counts.pop() if len(counts) == 1 else None
