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
from .common import INTERPRET, _dot, _grouped_tile, _narrow, cdiv, dot_precision

FIRST_TRITON = {90: (3, 6), 100: (3, 7)}  # 3.6 fails to specialise for sm_100


@triton.jit
def _warp_specialised_kernel(
    p_x,
    p_y,
    out,
    D,
    stride_x,
    stride_y,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    ACC: tl.constexpr = out.row_part.dtype.element_ty
    R, C = out.rows, out.columns
    # what lies past an edge is read as zeros and never written
    d_x = tl.make_tensor_descriptor(p_x, [R, D], [stride_x, 1], [BLOCK_R, BLOCK_K])
    d_y = tl.make_tensor_descriptor(p_y, [C, D], [stride_y, 1], [BLOCK_C, BLOCK_K])
    if out.e is not None:
        d_e = tl.make_tensor_descriptor(out.e, [R, C], [out.stride_e, 1], [BLOCK_R, BLOCK_C])
    tiles_r, tiles_c = tl.cdiv(R, BLOCK_R), tl.cdiv(C, BLOCK_C)
    b_k = tl.load(out.exponent).to(ACC) * 1.4426950408889634  # exp(a) = exp2(a log2 e)
    for i_tile in tl.range(tl.program_id(0), tiles_r * tiles_c, tl.num_programs(0), warp_specialize=True):
        i_r, i_c = _grouped_tile(i_tile, tiles_r, tiles_c, GROUP)
        b_acc = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        for k in range(0, D, BLOCK_K):
            b_acc = _dot(d_x.load([i_r * BLOCK_R, k]), d_y.load([i_c * BLOCK_C, k]).T, b_acc, PRECISION)
        o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        m_r, m_c = o_r < R, o_c < C
        b_shift = tl.load(out.shift + o_r, mask=m_r, other=float("inf")).to(ACC) * 1.4426950408889634
        if out.scales is not None:
            # the row's factor joins 1 / temperature: one multiplication an element, and one fused with the shift
            b_row = tl.load(out.scales.row + o_r, mask=m_r, other=0.0).to(ACC) * b_k
            b_col = tl.load(out.scales.col + o_c, mask=m_c, other=0.0).to(ACC)
            b_power = b_acc * b_row[:, None] * b_col[None, :] - b_shift[:, None]
        else:
            b_power = b_acc * b_k - b_shift[:, None]
        if out.scales is not None or not EVEN_C:
            # with norms always: triton 3.9 spills without this select, which keeps the columns' factors from waiting in registers
            b_power = tl.where(m_c[None, :], b_power, -1e30)
        if out.masks.positive is not None:
            b_positive = tl.load(out.masks.positive + o_r, mask=m_r, other=-1).to(tl.int32)
            b_power = tl.where(b_positive[:, None] == (o_c + out.column_offset)[None, :], -1e30, b_power)
        b_e = tl.exp2(b_power)
        if out.e is not None:
            d_e.store([i_r * BLOCK_R, i_c * BLOCK_C], _narrow(b_e, out.e.dtype.element_ty))
        # (column tile, row): a row tile writes one contiguous piece
        tl.store(out.row_part + i_c.to(tl.int64) * R + o_r, tl.sum(b_e, 1), mask=m_r)


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


def launch(x, y, epilogue, tile, programs: int) -> None:
    """One launch over all tiles; x (R, D), y (C, D) and an `exp_panel.Epilogue` of one level with positives and scales alone."""
    tiles = cdiv(epilogue.rows, tile.block_r) * cdiv(epilogue.columns, tile.block_c)

    def run():
        # Triton asks a variable of the context for memory: set in a copy of it, the program's own setting stays as it is
        triton.set_allocator(scratch)
        _warp_specialised_kernel[(min(programs, tiles),)](
            x,
            y,
            epilogue,
            x.shape[1],
            x.stride(0),
            y.stride(0),
            EVEN_C=epilogue.columns % tile.block_c == 0,
            PRECISION=dot_precision(x.dtype),
            GROUP=tile.group,
            **tile.constants,
            **tile.options,
        )

    contextvars.copy_context().run(run)
