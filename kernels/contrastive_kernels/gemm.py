"""Matrix products of the torch backend, each through the library that is fast on the processor at hand.

torch.mm in float32 is MKL on x86, which keeps its AVX-512 kernels for Intel's processors: on a Zen 5 core it reached 100 GFLOP/s
where oneDNN, which torch carries too, reached 220. oneDNN's product is a @ b^T into a new tensor; both of its operands should
be contiguous along the summed dimension (one strided operand costs 5 to 30 %), so callers transpose the smaller one with
`transposed`. MKL takes operands and results as they lie, in place, and likes its products large: the same work cut into tiles
of a thousand columns cost 3 to 10 % more on a Sapphire Rapids core.
"""

from __future__ import annotations

import functools
import pathlib
import re

import torch

LEAST_FLOP = 1 << 23  # below it the call costs more than the product
_BLOCK = 256


@functools.cache
def _processor() -> str:
    """Vendor and capability: "AuthenticAMD AVX512"; "" where the vendor is not told."""
    try:
        vendor = re.search(r"^vendor_id\s*:\s*(\S+)", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return f"{vendor.group(1)} {torch.backends.cpu.get_cpu_capability()}" if vendor else ""


def prefers_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this type run faster in oneDNN than in the library behind torch.mm."""
    return (
        dtype == torch.float32
        and device.type == "cpu"
        and _processor() == "AuthenticAMD AVX512"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # its second operand may be transposed; rows of a wider matrix take a reference kernel, a thousand times slower
    b = b if b.is_contiguous() or b.T.is_contiguous() else b.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _worthwhile(a: torch.Tensor, b: torch.Tensor) -> bool:
    return 2 * a.shape[0] * a.shape[1] * b.shape[0] >= LEAST_FLOP and prefers_onednn(a.dtype, a.device)


def transposed(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x^T as an operand that meets `rows` rows: a copy where the library wants one, else a view."""
    if 2 * x.numel() * rows >= LEAST_FLOP and prefers_onednn(x.dtype, x.device):
        return x.T.contiguous()
    return x.T


def operand_of(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x^T as an operand that meets `rows` rows, of some columns of a wider matrix: contiguous memory for either library."""
    if 2 * x.numel() * rows >= LEAST_FLOP and prefers_onednn(x.dtype, x.device):
        return x.T.contiguous()
    return x.contiguous().T


def transpose_into(out: torch.Tensor, x: torch.Tensor) -> None:
    """out (m, n) = x (n, m)^T, block by block: at once it takes torch three times as long."""
    for start in range(0, len(x), _BLOCK):
        out[:, start : start + _BLOCK].copy_(x[start : start + _BLOCK].T)


def product_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float | torch.Tensor = 1.0) -> None:
    """out (m, n) = scale * a (m, k) @ b (n, k)^T."""
    if _worthwhile(a, b):
        torch.mul(_onednn(a, b), scale, out=out)
    elif isinstance(scale, torch.Tensor):
        torch.mm(a, b.T, out=out)
        out.mul_(scale)
    elif scale == 1.0:
        torch.mm(a, b.T, out=out)
    else:
        torch.addmm(out, a, b.T, beta=0, alpha=scale, out=out)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (m, k) @ b (n, k)^T, a new tensor."""
    return _onednn(a, b) if _worthwhile(a, b) else a @ b.T


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out (m, n) += a (m, k) @ b (n, k)^T."""
    if _worthwhile(a, b):
        out.add_(_onednn(a, b))
    else:
        out.addmm_(a, b.T)


class RowSum:
    """A sum over tiles of E (rows, c) @ B (c, width), held the way that the library at hand adds fastest.

    oneDNN makes (width, rows), of which both operands are contiguous along c where E is stored transposed; torch.mm adds in place
    to (rows, width), which took it 8 % less time than the transpose; stretches of 128 columns took twice as much as `transposed`.
    """

    def __init__(self, rows: int, width: int, like: torch.Tensor, transposed: bool = False):
        self.rows, self.transposed = rows, transposed or prefers_onednn(like.dtype, like.device)
        self.held = like.new_zeros(width, rows) if self.transposed else like.new_empty(rows, width)
        self._begun: set[int] = set()

    def operand(self, candidates: torch.Tensor) -> torch.Tensor:
        """B (c, width), or some columns of it, as `add` wants it."""
        return transposed(candidates, self.rows) if self.transposed else candidates

    def add(self, part: torch.Tensor, operand: torch.Tensor, columns: slice = slice(None)) -> None:
        """held[:, columns] += part (rows, c) @ B[:, columns]; calls name the same stretches of columns each time, and all of them."""
        if self.transposed:
            add_product(self.held[columns], operand, part)
        else:
            first = columns.start or 0
            self.held[:, columns].addmm_(part, operand, beta=1 if first in self._begun else 0)
            self._begun.add(first)

    def copy_to(self, out: torch.Tensor) -> None:
        """out (rows, width) = the sum."""
        if self.transposed:
            transpose_into(out, self.held)
        else:
            out.copy_(self.held)

    def result(self) -> torch.Tensor:
        """(rows, width), contiguous; the sum's own memory where that is its layout."""
        return self.held.T.contiguous() if self.transposed else self.held
