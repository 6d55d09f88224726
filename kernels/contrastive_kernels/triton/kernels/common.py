"""What every kernel here splits: the interpreter's needs, the element types, and the mask of a tile of cosines.

Legend of shapes, in all files of this folder: R rows (anchors), C columns (candidates), D width, L Matryoshka levels, T tiles.
Inside kernels: b_ block value, p_ pointer, o_ offset, m_ mask, i_ program id.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..interpreter import INTERPRET

LOG2E = 1.4426950408889634
UPCAST = tl.constexpr(INTERPRET)
MAXIMUM_COLUMNS = 2**31 - 129  # less the 128 numbers that stand for top-k's empty slots

TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 (truth under the interpreter), float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot: what torch would do for its own float32 products, IEEE unless the user allowed tf32."""
    if dtype != torch.float32:
        return "ieee"
    # the older switch, allow_tf32, sets this one too, but cannot be read any more once a program has set this one
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in TRITON_DTYPE or (dtype == torch.float64 and not INTERPRET):
        raise ValueError(f"{name}: expected bfloat16, float16 or float32 for the Triton kernels, got {dtype}; use backend='torch'")


def check_columns(name: str, columns: int) -> None:
    """Kernels compare a column's number in 32 bits, and the greatest stand for "none"."""
    if columns > MAXIMUM_COLUMNS:
        raise ValueError(
            f"{name}: expected at most {MAXIMUM_COLUMNS} columns for the Triton kernels, got {columns}; use backend='torch' or fewer a call"
        )


def scalar(value: float | torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A 0-d tensor on the device, filled there: torch.as_tensor would copy a number from the host and wait for the copy."""
    if isinstance(value, torch.Tensor):
        return value if value.dtype == dtype and value.device == device else value.to(device=device, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=device)


def on_its_device(launcher):
    """Launch on the GPU that the tensors are on: Triton takes the current one, whatever it is given."""

    @functools.wraps(launcher)
    def guarded(*args, **kwargs):
        tensor = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        if INTERPRET or tensor is None or not tensor.is_cuda or tensor.device.index in (None, torch.cuda.current_device()):
            return launcher(*args, **kwargs)
        with torch.cuda.device(tensor.device):
            return launcher(*args, **kwargs)

    return guarded


class Scales(NamedTuple):
    """Factors of the cosines as one argument of a kernel: inverse norms of the rows (R,) and of the columns (C,); None for none."""

    row: torch.Tensor | None
    col: torch.Tensor | None

    @classmethod
    def of(cls, row: torch.Tensor | None, col: torch.Tensor | None) -> "Scales | None":
        return None if row is None else cls(row, col)


class Masks(NamedTuple):
    """What takes candidates out of the rows' negatives, as one argument of a kernel. Vectors are contiguous: no stride is taken.

    A field that is None is known to be so when the kernel is compiled, and costs nothing.

    Args:
        positive: (R,) int64, column of the row's positive; -1 for none.
        ids, more_ids: ((R,), (C,)) int64; a column that bears its row's number is no negative.
        threshold: (R,) cosines above which a column is no negative. keep: (C,) uint8, 0 where a column is no candidate.
    """

    positive: torch.Tensor | None
    ids: tuple[torch.Tensor, torch.Tensor] | None
    more_ids: tuple[torch.Tensor, torch.Tensor] | None
    threshold: torch.Tensor | None
    keep: torch.Tensor | None

    @classmethod
    def of(cls, positive=None, ids=(), threshold=None, keep=None) -> "Masks":
        """From the launchers' arguments: at most two pairs of ids, and a bool `keep`."""
        first, second = (*ids, None, None)[:2]
        return cls(positive, first, second, threshold, None if keep is None else keep.view(torch.uint8))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def whole_blocks(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """The matrix with a contiguous width that is a multiple of `block`, zeros appended; a copy only where it has to be.

    The hot loops have no masks and load 16 bytes a thread, which a ragged width forbids. Widths of real models are multiples.
    """
    rest = -matrix.shape[1] % block
    if rest:
        return torch.nn.functional.pad(matrix, (0, rest))
    aligned = matrix.stride(1) == 1 and matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
    return matrix if aligned else matrix.contiguous()


@triton.jit
def _dot(b_x, b_y, b_acc, PRECISION: tl.constexpr):
    """acc + x @ y. The interpreter's products of bfloat16 are garbage, so there (UPCAST) operands are widened first."""
    if UPCAST:
        b_x = b_x.to(b_acc.dtype)
        b_y = b_y.to(b_acc.dtype)
    return tl.dot(b_x, b_y, b_acc, input_precision=PRECISION, out_dtype=b_acc.dtype)


@triton.jit
def _narrow(b_x, DTYPE: tl.constexpr):
    """Cast to the storage type, rounding to nearest even. The interpreter truncates to bfloat16: there the bits are rounded by hand."""
    if UPCAST and DTYPE == tl.bfloat16:
        b_bits = b_x.to(tl.float32).to(tl.uint32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & 0xFFFF0000
        return b_bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return b_x.to(DTYPE)


@triton.jit
def _grouped_tile(i_pid, tiles_r, tiles_c, GROUP: tl.constexpr):
    """Programs walk GROUP row tiles before they move one column tile on, so that operand tiles are re-read from L2."""
    per_group = GROUP * tiles_c
    first = (i_pid // per_group) * GROUP
    rows = tl.minimum(tiles_r - first, GROUP)
    return first + (i_pid % per_group) % rows, (i_pid % per_group) // rows


@triton.jit
def _halves(b_tile):
    """Left and right half of a tile; no data moves, since no layout of the tensor cores splits a row between its halves' warps."""
    return tl.split(tl.permute(tl.reshape(b_tile, (b_tile.shape[0], 2, b_tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _slices(b_tile, SLICES: tl.constexpr):
    """A tile as a tuple of 1, 2, 4 or 8 slices of columns, left to right."""
    if SLICES == 1:
        return (b_tile,)
    elif SLICES == 2:
        return _halves(b_tile)
    else:
        b_low, b_high = _halves(b_tile)
        return _slices(b_low, SLICES // 2) + _slices(b_high, SLICES // 2)


@triton.jit
def _per_row(b_vector, ON_SIDE: tl.constexpr):
    """A vector over rows, ready to meet a (rows, columns) tile, or a (columns, rows) tile that stands on its side."""
    return b_vector[None, :] if ON_SIDE else b_vector[:, None]


@triton.jit
def _per_column(b_vector, ON_SIDE: tl.constexpr):
    return b_vector[:, None] if ON_SIDE else b_vector[None, :]


@triton.jit
def _scaled_cosines(b_cos, scales, o_r, o_c, m_r, m_c):
    """Cosines of a (rows, columns) tile from its products."""
    if scales is not None:
        b_cos = b_cos * tl.load(scales.row + o_r, mask=m_r, other=0.0)[:, None]
        b_cos = b_cos * tl.load(scales.col + o_c, mask=m_c, other=0.0)[None, :]
    return b_cos


@triton.jit
def _at_most(b_cos, b_bound):
    """The smaller one; a NaN stays, where a plain minimum gives the other number."""
    return tl.minimum(b_cos, b_bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _drop(b_cos, masks, o_r, o_c, m_r, m_c, o_threshold, o_global, EVEN_C: tl.constexpr, ON_SIDE: tl.constexpr):
    """Cosines of a tile with everything that is no negative set to -1e30: positive, false negatives, padding.

    -1e30 and not -inf, since its exponential is 0 all the same and 0 * -1e30 stays 0. Each condition is a comparison and a select
    on the spot: anding boolean tiles would pack and unpack predicate registers, three times the instructions.
    o_r, o_c index the per-row and per-column vectors, o_threshold the thresholds; o_global is the column's number as `positive` counts it.
    """
    if masks.threshold is not None:
        # first, while the cosines are themselves; not-greater keeps a NaN in, to be seen in the loss
        b_threshold = tl.load(masks.threshold + o_threshold, mask=m_r, other=float("inf"))
        b_cos = tl.where(b_cos > _per_row(b_threshold, ON_SIDE), -1e30, b_cos)
    if masks.keep is not None:
        b_keep = tl.load(masks.keep + o_c, mask=m_c, other=0)
        b_cos = _at_most(b_cos, _per_column(tl.where(b_keep != 0, 1e30, -1e30).to(b_cos.dtype), ON_SIDE))
    elif not EVEN_C:
        b_cos = _at_most(b_cos, _per_column(tl.where(m_c, 1e30, -1e30).to(b_cos.dtype), ON_SIDE))
    if masks.positive is not None:
        # 32 bits are enough for a column's number and halve the comparisons
        b_positive = tl.load(masks.positive + o_r, mask=m_r, other=-1).to(tl.int32)
        b_cos = tl.where(_per_row(b_positive, ON_SIDE) == _per_column(o_global.to(tl.int32), ON_SIDE), -1e30, b_cos)
    if masks.ids is not None:
        b_cos = _drop_same(b_cos, masks.ids, o_r, o_c, m_r, m_c, ON_SIDE)
    if masks.more_ids is not None:
        b_cos = _drop_same(b_cos, masks.more_ids, o_r, o_c, m_r, m_c, ON_SIDE)
    return b_cos


@triton.jit
def _drop_same(b_cos, ids, o_r, o_c, m_r, m_c, ON_SIDE: tl.constexpr):
    # the launchers' contract: a row whose id matches nothing comes with a number that no column bears
    b_row = tl.load(ids[0] + o_r, mask=m_r, other=-0x7FFFFFFFFFFFFFFF)
    b_col = tl.load(ids[1] + o_c, mask=m_c, other=-1)
    return tl.where(_per_row(b_row, ON_SIDE) == _per_column(b_col, ON_SIDE), -1e30, b_cos)
