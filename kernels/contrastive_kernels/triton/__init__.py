"""The Triton kernels. `available()` says whether they can run here; nothing in this file imports Triton before it is asked to.

Inside this folder `import triton` is the library: imports are absolute.
"""

import functools
import importlib.util


@functools.lru_cache(maxsize=1)
def available() -> tuple[bool, str]:
    """Whether the kernels can run in this process, and if not, why: (True, "") or (False, reason)."""
    if importlib.util.find_spec("triton") is None:
        return False, "the triton package is not installed (it has no wheels for macOS and Windows)"
    import torch

    from .kernels.common import INTERPRET

    if INTERPRET:
        return True, ""
    if not torch.cuda.is_available():
        return False, "no CUDA device; set TRITON_INTERPRET=1 before Python starts to interpret the kernels on the CPU"
    return True, ""
