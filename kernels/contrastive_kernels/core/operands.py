"""Matrices as the GEMMs want them: in the compute dtype, normalised, masked, one tile at a time.

A bf16 batch, or one that is normalised on the fly, would need a full copy of itself in float32. Tiles need a few MiB:
preparing them costs O(rows * D) a panel, next to the panel's O(R * rows * D) products.
"""

from __future__ import annotations

import abc
import dataclasses
import functools

import torch

TILE_BYTES = 16 << 20


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 when any input is float64, else float32: logits are never computed in less."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def product_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """What the kernels' products take: the inputs' type, the wider one where they differ (as under autocast they may)."""
    return functools.reduce(torch.promote_types, {t.dtype for t in tensors})


@dataclasses.dataclass
class Operand:
    """One side of a product: `source` (n, D), read through `index`, scaled by `inverse_norm`, zeroed where not `keep`.

    Args:
        source: (n, D) matrix as the user passed it.
        dtype: what tiles come in.
        inverse_norm: (n,) or None, factor of each source row.
        keep: (n,) bool or None; rows that are False come out as zeros whatever they hold (NaN times 0 is NaN).
        index: (rows,) int64 or None: row r of the operand is row index[r] of the source.
        row_scale: (rows,) or None, a further factor of each row of the operand, whatever its source row.
    """

    source: torch.Tensor
    dtype: torch.dtype
    inverse_norm: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    index: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.source if self.index is None else self.index)

    @property
    def width(self) -> int:
        return self.source.shape[1]

    @property
    def plain(self) -> bool:
        """True when a tile is a view of the source."""
        return (
            self.source.dtype == self.dtype
            and self.inverse_norm is None
            and self.keep is None
            and self.index is None
            and self.row_scale is None
            and self.source.stride(1) == 1
        )

    def gathered(self, index: torch.Tensor) -> Operand:
        return dataclasses.replace(self, index=index)

    def scaled(self, row_scale: torch.Tensor | None) -> Operand:
        """The operand itself where there is no factor."""
        return self if row_scale is None else dataclasses.replace(self, row_scale=row_scale)

    def every(self, step: int, rows: int) -> Operand:
        """Rows 0, step, 2 step, ...: `rows` of them, as views."""

        def cut(tensor):
            return None if tensor is None else tensor[: rows * step : step]

        return dataclasses.replace(self, source=cut(self.source), inverse_norm=cut(self.inverse_norm), keep=cut(self.keep))

    def narrow(self, start: int, stop: int) -> Operand:
        """The same operand over columns [start, stop) of the embedding."""
        return dataclasses.replace(self, source=self.source[:, start:stop])

    def narrow_rows(self, start: int, stop: int) -> Operand:
        """Rows [start, stop) alone."""

        def cut(tensor):
            return None if tensor is None else tensor[start:stop]

        if self.index is not None:
            return dataclasses.replace(self, index=self.index[start:stop], row_scale=cut(self.row_scale))
        return dataclasses.replace(
            self, source=self.source[start:stop], inverse_norm=cut(self.inverse_norm), keep=cut(self.keep), row_scale=cut(self.row_scale)
        )

    def tile(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) in the compute dtype: a view when nothing has to be done to them."""
        if self.plain:
            return self.source[start:stop]
        rows = slice(start, stop) if self.index is None else self.index[start:stop]
        out = self.source[rows].to(self.dtype)
        if self.inverse_norm is not None:
            out = out * self.inverse_norm[rows, None]
        if self.row_scale is not None:
            out = out * self.row_scale[start:stop, None]
        if self.keep is not None:
            out = torch.where(self.keep[rows, None], out, out.new_zeros(()))
        return out

    def steps(self) -> list[tuple[int, int]]:
        """Row ranges whose tiles stay within TILE_BYTES; one range when tiles are views."""
        if self.plain:
            return [(0, self.rows)]
        size = max(1, TILE_BYTES // max(1, self.width * self.dtype.itemsize))
        return [(a, min(a + size, self.rows)) for a in range(0, self.rows, size)]


class RowOperations(abc.ABC):
    """What a backend does to rows of one matrix or two.

    Attributes:
        strided_positives: default positives are read as every M/N-th row, as views, instead of through their index.
    """

    strided_positives: bool

    @abc.abstractmethod
    def inverse_norms(self, matrix: torch.Tensor, dtype: torch.dtype, eps: float, keep: torch.Tensor | None) -> torch.Tensor:
        """(n,) 1 / max(|x|, eps) of every row, 1 where not `keep`."""

    @abc.abstractmethod
    def row_dots(self, a: Operand, b: Operand) -> torch.Tensor:
        """(n,) dot products of matching rows."""

    @abc.abstractmethod
    def project_out(self, gradient: torch.Tensor, operand: Operand, eps: float) -> None:
        """Turn, in place, the gradient of an operand's normalised rows into that of its rows as passed."""


def norms(matrix: torch.Tensor, dtype: torch.dtype, keep: torch.Tensor | None = None) -> torch.Tensor:
    """(rows,) L2 norms in `dtype`, without a full copy of a low-precision matrix; 1 where not `keep`."""
    out = torch.linalg.vector_norm(matrix, dim=-1, dtype=dtype)
    return out if keep is None else torch.where(keep, out, out.new_ones(()))


def inverse_norms(matrix, dtype, eps, keep=None) -> torch.Tensor:
    return norms(matrix, dtype, keep).clamp_(min=eps).reciprocal_()


def row_dots(a: Operand, b: Operand) -> torch.Tensor:
    """(n,) dot products of matching rows, a few MiB at a time."""
    out = torch.empty(a.rows, dtype=a.dtype, device=a.source.device)
    step = max(1, (1 << 18) // max(1, a.width))  # products that stay in the cache
    for start in range(0, a.rows, step):
        stop = min(start + step, a.rows)
        out[start:stop] = (a.tile(start, stop) * b.tile(start, stop)).sum(1)
    return out


def project_out(grad: torch.Tensor, operand: Operand, eps: float) -> None:
    """Turn, in place, the gradient of the normalised rows into that of the rows as passed: (g - (g.x) x) / norm.

    A row shorter than eps has no direction: its gradient is 0, where x / eps would give one of 1 / eps.
    """
    if operand.inverse_norm is None:
        return
    scale = torch.where(operand.inverse_norm < 0.999 / eps, operand.inverse_norm, 0)
    for start, stop in operand.steps():
        x = operand.tile(start, stop)
        g = grad[start:stop]
        g.addcmul_(x, (g * x).sum(1, keepdim=True), value=-1).mul_(scale[start:stop, None])


def scatter_rows(out: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """out[index] += rows, the same result each time: on CUDA index_add_ is atomic, index_put_ sorts."""
    if out.is_cuda:
        out.index_put_((index,), rows, accumulate=True)
    else:
        out.index_add_(0, index, rows)
