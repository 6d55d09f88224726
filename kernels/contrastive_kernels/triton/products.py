"""The two products with the library that follow a panel of exponentials: d_anchors = E Y and d_candidates += E^T (diag(f) X).

E is in the operands' type, results are float32: on CUDA by `out_dtype`, which the library has there only; elsewhere by widening.
"""

import torch

from . import launch_log
from .kernels.norms import scaled


def matmul(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """a @ b accumulated and returned in `out_dtype`."""
    launch_log.note(
        "gemm", 0, 2 * a.shape[0] * a.shape[1] * b.shape[1], launch_log.size(a, b), a.shape[0] * b.shape[1] * out_dtype.itemsize
    )
    if a.dtype == out_dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out_dtype)
    return a.to(out_dtype) @ b.to(out_dtype)


def add_matmul(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out += a @ b in place, accumulated in the type of `out`."""
    launch_log.note("gemm", 0, 2 * a.shape[0] * a.shape[1] * b.shape[1], launch_log.size(a, b, out), launch_log.size(out))
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def row_scaled(x: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """diag(factor * scale) x in the type of x, and what the product with it must still be multiplied by (None for 1).

    bfloat16 and float32 hold a factor as small as w / Z. float16 does not: there the largest factor becomes 1 and comes back
    as a 0-d tensor, read on the device.
    """
    if x.dtype != torch.float16:
        return scaled(x, factor, scale), None
    factor = factor if scale is None else factor * scale
    top = factor.abs().amax()
    top = torch.where(top > 0, top, torch.ones_like(top))
    return scaled(x, factor / top), top


def add_scaled_matmul(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor | None) -> None:
    """out += factor * (a @ b)."""
    if factor is None:
        add_matmul(out, a, b)
    else:
        out.add_(matmul(a, b, out.dtype).mul_(factor))
