"""Matrix products of the torch backend, each through the library that is fast on the processor at hand.

torch.mm in float32 is MKL on x86, which keeps its AVX-512 kernels for Intel's processors: on a Zen 5 core it reached 100 GFLOP/s
where oneDNN, which torch carries too, reached 220 (95 and 107 on a Zen 4 core). oneDNN's product is a @ b^T into a new tensor; both
of its operands should be contiguous along the summed dimension (one strided operand costs 5 to 30 %), so callers transpose the
smaller one with `transposed`, and one that meets several others is brought into oneDNN's own layout once, by `Packed` (4 %). MKL
takes operands and results as they lie, in place, and likes its products large: the same work cut into tiles of a thousand columns
cost 3 to 10 % more on a Sapphire Rapids core.

MKL adds at most 192 terms of a short sum one after another, oneDNN 512: at 512 its errors were 1.7 times MKL's where signs are mixed and
2.6 times where all are positive, at 256 and 1,536 1.4 and 2 times, and gradients were less exact than autograd's. `_cuts` says where
sums are cut for it, so that each product is within 1.7 times MKL's error; products are the only sums that hang on the processor.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

LEAST_FLOP = 1 << 23  # below it the call costs more than the product
FEW_TERMS = 192  # of a sum: MKL cuts longer ones
UNCUT_TERMS = 512  # oneDNN cuts longer ones: into halves up to
MOST_TERMS = 1024
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
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    )


def _worthwhile(operand: torch.Tensor, rows: int) -> bool:
    return 2 * operand.numel() * rows >= LEAST_FLOP and prefers_onednn(operand.dtype, operand.device)


def _cuts(terms: int) -> list[slice]:
    """Equal parts of a sum, so that oneDNN adds at most 512 terms one after another, and half of them in a sum of no more than that."""
    count = 1 if terms <= FEW_TERMS else 2 if terms <= UNCUT_TERMS else -(-terms // MOST_TERMS)
    step = -(-terms // count)
    return [slice(first, min(first + step, terms)) for first in range(0, terms, step)]


class Packed(NamedTuple):
    """A matrix b (n, k) in oneDNN's own layout, cut along k."""

    shape: torch.Size
    parts: list[torch.Tensor]


def _pack(b: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(b.contiguous(), rows)


def _onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def packed(b: torch.Tensor, rows: int) -> torch.Tensor | Packed:
    """b (n, k) as the second operand of several products of `rows` rows each: a copy where the library likes its own layout."""
    if not _worthwhile(b, rows):
        return b
    return Packed(b.shape, [_pack(b[:, cut], rows) for cut in _cuts(b.shape[1])])


def _dense(b: torch.Tensor) -> torch.Tensor:
    # oneDNN's second operand may be transposed; rows of a wider matrix take a reference kernel, a thousand times slower
    return b if b.is_contiguous() or b.T.is_contiguous() else b.contiguous()


def _partial(a: torch.Tensor, b: torch.Tensor | Packed, cut: bool = True) -> Iterator[torch.Tensor] | None:
    """Matrices, made by oneDNN one after another, whose sum is a @ b^T; None where the other library is to form it."""
    if not isinstance(b, Packed) and not _worthwhile(a, b.shape[0]):
        return None
    cuts = _cuts(a.shape[1]) if cut else [slice(None)]
    parts = b.parts if isinstance(b, Packed) else (_dense(b[:, cut]) for cut in cuts)
    return (_onednn(a[:, cut], part) for cut, part in zip(cuts, parts))


def transposed(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x^T as an operand that meets `rows` rows: a copy where the library wants one, else a view."""
    if _worthwhile(x, rows):
        return x.T.contiguous()
    return x.T


def operand_of(x: torch.Tensor, rows: int) -> torch.Tensor | Packed:
    """x^T as the second operand of several products of `rows` rows each, x some columns of a wider matrix: dense for either library."""
    return packed(x.T, rows) if _worthwhile(x, rows) else x.contiguous().T


def transpose_into(out: torch.Tensor, x: torch.Tensor) -> None:
    """out (m, n) = x (n, m)^T, block by block: at once it takes torch three times as long."""
    for start in range(0, len(x), _BLOCK):
        out[:, start : start + _BLOCK].copy_(x[start : start + _BLOCK].T)


def product_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor | Packed, cut: bool = True) -> None:
    """out (m, n) = a (m, k) @ b (n, k)^T; sums uncut where b, a tensor, meets one `a` alone: there cuts took a quarter more time."""
    parts = _partial(a, b, cut)
    if parts is None:
        torch.mm(a, b.T, out=out)
        return
    total, last = None, next(parts)
    for part in parts:
        total, last = last if total is None else total.add_(last), part
    out.copy_(last) if total is None else torch.add(total, last, out=out)


def product(a: torch.Tensor, b: torch.Tensor | Packed) -> torch.Tensor:
    """a (m, k) @ b (n, k)^T, a new tensor."""
    parts = _partial(a, b)
    return a @ b.T if parts is None else functools.reduce(torch.Tensor.add_, parts)


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor | Packed) -> None:
    """out (m, n) += a (m, k) @ b (n, k)^T."""
    parts = _partial(a, b)
    if parts is None:
        out.addmm_(a, b.T)
        return
    for part in parts:
        out.add_(part)


class RowSum:
    """A sum over tiles of E (rows, c) @ B (c, width), held the way that the library at hand adds fastest.

    oneDNN makes (width, rows), of which both operands are contiguous along c where E is stored transposed; torch.mm adds in place
    to (rows, width), which took it 8 % less time than the transpose; stretches of 128 columns took twice as much as `transposed`.
    """

    def __init__(self, rows: int, width: int, like: torch.Tensor, transposed: bool = False):
        self.rows, self.transposed = rows, transposed or prefers_onednn(like.dtype, like.device)
        self.accumulator = like.new_zeros(width, rows) if self.transposed else like.new_empty(rows, width)
        self._begun: set[int] = set()

    def operand(self, candidates: torch.Tensor) -> torch.Tensor:
        """B (c, width), or some columns of it, as `add` wants it."""
        return transposed(candidates, self.rows) if self.transposed else candidates

    def add(self, part: torch.Tensor, operand: torch.Tensor, columns: slice = slice(None)) -> None:
        """held[:, columns] += part (rows, c) @ B[:, columns]; calls name the same stretches of columns each time, and all of them."""
        if self.transposed:
            add_product(self.accumulator[columns], operand, part)
        else:
            first = columns.start or 0
            self.accumulator[:, columns].addmm_(part, operand, beta=1 if first in self._begun else 0)
            self._begun.add(first)

    def copy_to(self, out: torch.Tensor) -> None:
        """out (rows, width) = the sum."""
        if self.transposed:
            transpose_into(out, self.accumulator)
        else:
            out.copy_(self.accumulator)

    def result(self) -> torch.Tensor:
        """(rows, width), contiguous; the sum's own memory where that is its layout."""
        return self.accumulator.T.contiguous() if self.transposed else self.accumulator
