"""Notices of other libraries that lead astray, kept from the terminal of this project's programs; an `import` keeps nothing back."""

from __future__ import annotations

import logging

# logger: beginnings or parts of what it says
ASTRAY = {
    # bitsandbytes looks for a faster CPU kernel in Hugging Face's `kernels`, which nothing here needs; its own is used
    "bitsandbytes.backends.cpu.ops": ("gemm_4bit_forward",),
    # a line for each of many attempts; what cannot be had is told once, in the error
    "huggingface_hub.utils._http": ("Retrying in", "thrown while requesting"),
}


def keep_back() -> None:
    """Filter them out in this process. Warnings of the same loggers about anything else stay."""
    for name, parts in ASTRAY.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(parts))


class _Without(logging.Filter):
    def __init__(self, parts: tuple[str, ...]):
        super().__init__()
        self.parts = parts

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(part in record.getMessage() for part in self.parts)
