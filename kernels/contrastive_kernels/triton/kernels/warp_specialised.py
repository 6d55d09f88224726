"""The plain logits panel once more, for GPUs that copy tiles by themselves: persistent, TMA, warp-specialised (sm_90, sm_100).

    E_ij = exp(k cos_ij - shift_i), 0 at the positive        sums of rows as `exp_panel` leaves them

One program a multiprocessor walks the tiles. One warp copies operands (UTMALDG) up to `stages` steps ahead, through the end of a
tile into the next; two groups of four warps own half of the rows each and share nothing but those copies, so that one may be in
its epilogue while the other's products keep the tensor cores busy, as far ahead as the copies reach. The compiler makes the groups
from `tl.range(warp_specialize=True)`: with 8 warps it does not (triton 3.6 to 3.9, no word said), with `flatten` it spills, and
where the accumulator is cut in slices triton 3.6 fails, so the epilogue takes the tile whole.

FLOPs 2 R C D. Bytes: operands once from memory, 2 R C written. Nothing here has run on a GPU: it is compiled, read, and interpreted.
Source: the shape is CUTLASS's persistent cooperative kernel; the epilogue is that of exp_panel.py.
"""

import contextvars

import torch
import triton
import triton.language as tl

from .. import configs
from .common import INTERPRET, TRITON_DTYPE, _dot, _grouped_tile, _narrow, cdiv, dot_precision

FIRST_TRITON = {90: (3, 6), 100: (3, 7)}  # 3.6 fails to specialise for sm_100


@triton.jit
def _warp_specialised_kernel(
    p_x,
    p_y,
    p_e,
    p_exponent,
    p_shift,
    p_row_scale,
    p_col_scale,
    p_positive,
    p_row_part,
    R,
    C,
    D,
    stride_x,
    stride_y,
    stride_e,
    column_offset,
    HAS_SCALE: tl.constexpr,
    HAS_POSITIVE: tl.constexpr,
    STORE: tl.constexpr,
    EVEN_C: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # what lies past an edge is read as zeros and never written
    d_x = tl.make_tensor_descriptor(p_x, [R, D], [stride_x, 1], [BLOCK_R, BLOCK_K])
    d_y = tl.make_tensor_descriptor(p_y, [C, D], [stride_y, 1], [BLOCK_C, BLOCK_K])
    d_e = tl.make_tensor_descriptor(p_e, [R, C], [stride_e, 1], [BLOCK_R, BLOCK_C])
    tiles_r, tiles_c = tl.cdiv(R, BLOCK_R), tl.cdiv(C, BLOCK_C)
    b_k = tl.load(p_exponent).to(ACC) * 1.4426950408889634  # exp(a) = exp2(a log2 e)
    for i_tile in tl.range(tl.program_id(0), tiles_r * tiles_c, tl.num_programs(0), warp_specialize=True):
        i_r, i_c = _grouped_tile(i_tile, tiles_r, tiles_c, GROUP)
        b_acc = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        for k in range(0, D, BLOCK_K):
            b_acc = _dot(d_x.load([i_r * BLOCK_R, k]), d_y.load([i_c * BLOCK_C, k]).T, b_acc, PRECISION, UPCAST)
        o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        m_r, m_c = o_r < R, o_c < C
        b_shift = tl.load(p_shift + o_r, mask=m_r, other=float("inf")).to(ACC) * 1.4426950408889634
        if HAS_SCALE:
            # the row's factor joins 1 / temperature: one multiplication an element, and one fused with the shift
            b_row = tl.load(p_row_scale + o_r, mask=m_r, other=0.0).to(ACC) * b_k
            b_col = tl.load(p_col_scale + o_c, mask=m_c, other=0.0).to(ACC)
            b_power = b_acc * b_row[:, None] * b_col[None, :] - b_shift[:, None]
        else:
            b_power = b_acc * b_k - b_shift[:, None]
        if HAS_SCALE or not EVEN_C:
            # with norms always: triton 3.9 spills without this select, which keeps the columns' factors from waiting in registers
            b_power = tl.where(m_c[None, :], b_power, -1e30)
        if HAS_POSITIVE:
            b_positive = tl.load(p_positive + o_r, mask=m_r, other=-1).to(tl.int32)
            b_power = tl.where(b_positive[:, None] == (o_c + column_offset)[None, :], -1e30, b_power)
        b_e = tl.exp2(b_power)
        if STORE:
            d_e.store([i_r * BLOCK_R, i_c * BLOCK_C], _narrow(b_e, p_e.dtype.element_ty, UPCAST))
        # (column tile, row): a row tile writes one contiguous piece
        tl.store(p_row_part + i_c.to(tl.int64) * R + o_r, tl.sum(b_e, 1), mask=m_r)


def obstacle(
    arch: int, dtype: torch.dtype, *, plain: bool, columns: int, version: str = triton.__version__, interpreted: bool = INTERPRET
) -> str:
    """Why this panel cannot stand for `exp_panel`'s, or "".

    Args:
        arch: compute capability times ten. dtype: of the operands. interpreted: by the interpreter, which takes any type.
        plain: nothing is asked for but E, row sums, scales and positives. columns: rows of E must be whole 16 bytes apart.
    """
    family = configs.tuned_as(arch)
    if not plain:
        return "it has no ids, thresholds, masks, row maxima, column sums, Matryoshka levels or second launch"
    if columns * dtype.itemsize % 16:
        return f"{columns} columns of {dtype} are no multiple of 16 bytes, which a descriptor needs"
    if interpreted:
        return ""
    if family not in FIRST_TRITON:
        return f"compute capability {arch // 10}.{arch % 10} has no tensor memory accelerator that it was written for, 9.0 and 10.0 have"
    if dtype.itemsize != 2:
        return f"{dtype} has no tensor cores here"
    first = FIRST_TRITON[family]
    if tuple(int(part) for part in version.split(".")[:2]) < first:
        return f"triton {version} cannot specialise warps for sm_{family}, {first[0]}.{first[1]} can"
    return ""


def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Device memory for descriptors from torch's allocator: ordered by the current stream, and of the graph's own pool during a capture."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch(x, y, out, exponent, shift, row_scale, col_scale, positive, row_part, column_offset: int, tile, programs: int) -> None:
    """One launch over all tiles; arguments as `exp_panel` has prepared them, out (R, C) or None, row_part (tiles, R)."""
    rows, columns = len(x), len(y)

    def run():
        # Triton asks a variable of the context for memory: set in a copy of it, the program's own setting stays as it is
        triton.set_allocator(scratch)
        _warp_specialised_kernel[(min(programs, cdiv(rows, tile.block_r) * cdiv(columns, tile.block_c)),)](
            x,
            y,
            x if out is None else out,
            exponent,
            shift,
            x if row_scale is None else row_scale,
            x if col_scale is None else col_scale,
            x if positive is None else positive,
            row_part,
            rows,
            columns,
            x.shape[1],
            x.stride(0),
            y.stride(0),
            x.stride(0) if out is None else out.stride(0),
            column_offset,
            HAS_SCALE=row_scale is not None,
            HAS_POSITIVE=positive is not None,
            STORE=out is not None,
            EVEN_C=columns % tile.block_c == 0,
            ACC=TRITON_DTYPE[row_part.dtype],
            PRECISION=dot_precision(x.dtype),
            UPCAST=INTERPRET,
            GROUP=tile.group,
            **tile.constants,
            **tile.options,
        )

    contextvars.copy_context().run(run)
