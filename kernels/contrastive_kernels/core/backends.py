"""Which implementation takes a call: plain torch or the Triton kernels. Triton is imported where it is taken, not before."""

from __future__ import annotations

import torch

from ..eager.backend import EAGER
from ..options import BACKENDS
from .backend import log_once
from .option_checks import one_of


def obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the Triton kernels cannot take these tensors in this process, or None."""
    from .. import triton as kernels

    available, reason = kernels.available()
    if not available:
        return reason
    from ..triton.kernels.common import INTERPRET

    if not INTERPRET and device.type != "cuda":
        return f"the tensors are on {device.type}, the kernels run on CUDA"
    if INTERPRET and device.type != "cpu":
        return "TRITON_INTERPRET=1 runs the kernels on the CPU, and the tensors are not there"
    if dtype == torch.float64 and not INTERPRET:
        return "the kernels have no float64"
    if device.type == "cuda":
        from ..triton import configs

        return configs.unsupported(configs.architecture(device)) or None
    return None


def choose(backend: str, dtype: torch.dtype, device: torch.device) -> str:
    """ "torch" or "triton". `auto` takes the kernels on CUDA where it can, and says once why it does not.

    Raises ValueError for another name, and when "triton" is asked for and cannot be had.
    """
    one_of("backend", backend, BACKENDS)
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return EAGER
    reason = obstacle(dtype, device)
    if reason is None:
        from ..triton.backend import TRITON

        return TRITON
    if backend == "triton":
        raise ValueError(
            f"backend: expected tensors and a machine that 'triton' takes, got an obstacle: {reason}; use backend='auto' or 'torch'"
        )
    log_once(reason)
    return EAGER
