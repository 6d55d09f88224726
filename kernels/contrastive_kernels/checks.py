"""Checks of the tensors that a loss is given: ValueError with what was expected, what came, and the mend."""

from __future__ import annotations

import torch

from contrastive_kernels.options import InfoNCEOptions


def check_matrices(query: torch.Tensor, target: torch.Tensor) -> None:
    for name, matrix in (("query", query), ("target", target)):
        if matrix.dim() != 2:
            raise ValueError(f"{name}: expected 2 dimensions (rows, D), got shape {tuple(matrix.shape)}")
        if not matrix.dtype.is_floating_point:
            raise ValueError(f"{name}: expected a floating-point tensor, got {matrix.dtype}; call .float()")
        if matrix.numel() == 0:
            raise ValueError(f"{name}: expected at least one row and column, got shape {tuple(matrix.shape)}; skip empty batches")
    if query.shape[1] != target.shape[1]:
        raise ValueError(f"expected the same width, got query D={query.shape[1]} and target D={target.shape[1]}")
    if query.device != target.device:
        raise ValueError(f"expected one device, got query on {query.device} and target on {target.device}")
    if query.dtype != target.dtype and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(f"expected one dtype, got query {query.dtype} and target {target.dtype}; cast one of them")


def check_inputs(query, target, options: InfoNCEOptions) -> None:
    """Shapes, dtypes, devices; ranges too where looking at them does not wait for a GPU, or with validate=True."""
    check_matrices(query, target)
