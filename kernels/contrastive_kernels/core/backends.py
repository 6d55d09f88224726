"""Which implementation of a sweep runs: plain torch or the Triton kernels."""

from __future__ import annotations

import functools
import logging

import torch

from ..eager import sweep as panels
from ..eager import symmetric as both_directions
from ..options import BACKENDS, one_of
from . import operands
from .operands import product_dtype

logger = logging.getLogger(__name__)


@functools.cache
def _log_once(reason: str) -> None:
    logger.warning("contrastive_kernels: backend='auto' takes torch: %s", reason)


def obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the Triton kernels cannot take these tensors in this process, or None."""
    from .. import triton as kernels

    there, reason = kernels.available()
    if not there:
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
        return "torch"
    reason = obstacle(dtype, device)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(
            f"backend: expected tensors and a machine that 'triton' takes, got an obstacle: {reason}; use backend='auto' or 'torch'"
        )
    _log_once(reason)
    return "torch"


def sweep_for(problem, parts):
    """The sweep function for a problem's backend, dtype and device; `parts` are the directions it will be called with, in order."""
    if problem.backend == "torch":
        return panels.sweep if len(parts) == 1 else both_directions.sweep_both(parts, panels.sweep)
    from ..triton.sweep import sweep

    if len(parts) == 1:
        return sweep
    from ..triton.symmetric import sweep_both

    return sweep_both(problem, parts, sweep)


def shard_passes_for(problem, sums, gradients):
    """(sum_shard, differentiate_shard) of a ring for a problem's backend; `sums` and `gradients` are the passes in plain torch."""
    if problem.backend == "torch":
        return sums, gradients
    from ..triton.ring import differentiate_shard, sum_shard

    return sum_shard, differentiate_shard


def row_dots(a, b, backend: str):
    """(n,) dot products of matching rows of two operands; for "triton" the second has an index."""
    if backend == "torch":
        from .problem import row_dots as in_torch

        return in_torch(a, b)
    from ..triton.kernels.rows import operand_dots

    return operand_dots(a, b)


def inverse_norms(matrix, dtype: torch.dtype, eps: float, keep, backend: str):
    """(n,) 1 / max(|x|, eps) of every row, 1 where not `keep`."""
    if backend == "torch":
        return operands.inverse_norms(matrix, dtype, eps, keep)
    from ..triton.kernels.rows import inverse_norms as in_triton

    return in_triton(matrix, dtype, eps, keep)


def project_out(gradient, operand, eps: float, backend: str) -> None:
    """Turn, in place, the gradient of an operand's normalised rows into that of its rows as passed."""
    if operand.inverse_norm is None:
        return
    if backend == "torch":
        operands.project_out(gradient, operand, eps)
        return
    from ..triton.kernels.rows import project_out as in_triton

    in_triton(gradient, operand, eps)


def levels_for(query, target, options, workspace: int):
    """What makes all Matryoshka levels from one sweep, called with (query, target, levels, wanted); None for a level at a time."""
    if choose(options.backend, product_dtype(query, target), query.device) == "torch":
        return None
    from ..triton import matryoshka as levels

    plan = levels.plan(query, target, options, workspace)
    return functools.partial(levels.compute, rows=plan.rows) if plan.path == "levels" else None


def sigmoid_columns_for(dtype: torch.dtype, device: torch.device):
    """What adds a block of columns of the sigmoid loss on a GPU, in place of plain torch; None for torch."""
    if choose("auto", dtype, device) == "torch":
        return None
    from ..triton.kernels.common import INTERPRET

    if dtype.itemsize > 2 and not INTERPRET:
        _log_once(f"sigmoid_loss of {dtype}, which has no tensor cores here: the library's products are faster")
        return None
    from ..triton.kernels.sigmoid_panel import add_columns

    return add_columns
