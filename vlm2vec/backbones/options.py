"""The families' options: what may be asked of a value before a family looks at it."""

from __future__ import annotations

import math
from typing import Any

from vlm2vec.files.documents import shown

MOST = 10**12  # of a count: more is a slip, and beyond what libraries hold in an integer
OPTIONAL_COUNTS = ("max_length", "text_max_length", "max_image_pixels", "max_frames")  # None means no limit
OPTIONAL_NUMBERS = ("fps", "seconds_per_step")  # None means that another option, or the input, decides


def check_option(name: str, value: Any, default: Any) -> None:
    """A ValueError unless an option is of its default's kind; numbers are positive. Names and sizes are the families' own to check."""
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(default, int) or name in OPTIONAL_COUNTS:
        fits, wanted = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST, "an integer of at least 1"
        if name in OPTIONAL_COUNTS:
            fits, wanted = fits or value is None, f"{wanted}, or None"
    elif isinstance(default, float) or name in OPTIONAL_NUMBERS:
        fits, wanted = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf, "a number above 0"
        if name in OPTIONAL_NUMBERS:
            fits, wanted = fits or value is None, f"{wanted}, or None"
    else:
        return
    if not fits:
        raise ValueError(f"{name}={shown(value)}: expected {wanted}")
