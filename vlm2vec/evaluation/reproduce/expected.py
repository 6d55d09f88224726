"""Within what two scores of one task may differ: the binomial interval of the task's size."""

from __future__ import annotations

import math

Z = 1.959964  # of 95 %


def interval(score: float, count: int, *, rounding: float = 0.0, z: float = Z) -> tuple[float, float]:
    """Wilson's interval of a share that was seen in `count` queries, widened by half of the last digit that was printed.

    Scores with grades (nDCG) lie between 0 and 1 too, and spread less than hits of the same mean do: for them the interval is wide.

    Args:
        score: a fraction, 0 to 1. rounding: by which it may have been rounded, as a fraction.

    Returns: (low, high), fractions.

    Raises:
        ValueError: a score outside of 0 to 1, or no query.

    Example:
        >>> low, high = interval(0.5, 1000)
        >>> round(100 * low, 1), round(100 * high, 1)
        (46.9, 53.1)
    """
    if not 0 <= score <= 1 or count < 1:
        raise ValueError(f"expected a score from 0 to 1 and at least one query, got {score} and {count}; give fractions, not percent")
    spread = z * z / count
    middle = (score + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(score * (1 - score) / count + spread / (4 * count))
    return max(0.0, min(score, middle - half) - rounding), min(1.0, max(score, middle + half) + rounding)
