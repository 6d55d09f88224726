"""What is made of a large file once and read from then on: beside the tables of `datasets`, named by the file as it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm2vec.files import replacing

_VERSION = 2  # of what is written; another one is made anew


def cached(file: str, ending: str, options: Any, make: Callable[[Path], None]) -> Path:
    """The path of what `make(path)` wrote for this file as it is now (place, size, time of its last change) and these options.

    It lies in `datasets`' own cache (HF_DATASETS_CACHE), and appears whole or not at all; of several processes one makes it.
    """
    import datasets
    from filelock import FileLock

    real, about = os.path.realpath(file), os.stat(file)
    told = repr((_VERSION, real, about.st_size, about.st_mtime_ns, options))
    path = Path(datasets.config.HF_DATASETS_CACHE, "vlm2vec", hashlib.blake2b(told.encode(), digest_size=16).hexdigest() + ending)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # the others wait, and find it made
            if not path.exists():
                with replacing(path, durable=False) as part:
                    make(part)
    return path
