"""glibc's malloc in a program that runs for weeks: freed pictures go back to the system.

Each thread would have a heap of its own, and heaps of threads that decode pictures keep what they once needed. Two heaps are as fast here,
and every few seconds their free pages are given back. (A low threshold for mmap keeps memory flat too, and took 60 % more processor time.)
Other systems' malloc is left alone.
"""

from __future__ import annotations

import ctypes
import time

_ARENA_MAX, _ARENAS = -8, 2  # M_ARENA_MAX of malloc.h
EVERY_SECONDS = 5.0


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
    except OSError:
        return None


class FreePages:
    """Gives free pages back, at most once in `EVERY_SECONDS`."""

    def __init__(self):
        self._library, self._last = _glibc(), time.monotonic()

    def share_heaps(self) -> None:
        """Few heaps for all threads that begin from now on."""
        if self._library is not None:
            self._library.mallopt(_ARENA_MAX, _ARENAS)

    def give_back(self) -> bool:
        """Whether it was time."""
        if self._library is None or time.monotonic() - self._last < EVERY_SECONDS:
            return False
        self._library.malloc_trim(0)
        self._last = time.monotonic()
        return True
