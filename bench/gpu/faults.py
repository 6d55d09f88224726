"""What an error says, and whether the process lost its device by it."""

from __future__ import annotations

import re

# errors after which every later call of the process fails; running out of memory is none
_POISON = re.compile(
    r"CUDA error: (?!out of memory)|illegal memory access|device-side assert|misaligned address|unspecified launch failure"
)


def poisoned(error: BaseException) -> bool:
    """Whether the process lost its device by this error, as far as its text tells."""
    return bool(_POISON.search(str(error)))


def described(error: BaseException) -> str:
    """Type and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
