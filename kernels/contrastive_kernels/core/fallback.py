"""Says once why `backend="auto"` does not take the kernels."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger(__name__)


@functools.cache
def log_once(reason: str) -> None:
    logger.warning("contrastive_kernels: backend='auto' takes torch: %s", reason)
