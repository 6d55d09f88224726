"""Logits product whose epilogue stores exponentials: E_ij = exp(k cos_ij - shift_i) over the kept negatives, 0 elsewhere.

    cos_ij = x_i . y_j * row_scale_i * col_scale_j        k = 1/temperature (+ hardness)

and, in the same pass, per row sum_j E_ij and max_j cos_ij (statistics, and the check that the fixed shift was safe), per column
sum_i E_ij. The positive is left out of E, see docs/design.md, "How it is computed". sum_j E_ij cos_ij, which the temperature's
gradient needs, is x_i . (E Y)_i and costs nothing beyond the query's gradient, so it is not reduced here.

FLOPs 2 R C D. Bytes: operands once from memory (re-read from L2), 2 R C written for 16-bit types, no float32 logits.
Every program leaves its partial sums in its own place and a second, small sum adds them up in a fixed order: deterministic.
Source: the design of this repository; the fixed shift is that of CLIP-style losses, bounded so that it cannot under- or overflow.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...roofline import REDO_PROGRAMS
from .. import configs, launch_log
from . import warp_specialised
from .common import (
    Masks,
    Scales,
    _dot,
    _drop,
    _grouped_tile,
    _narrow,
    _scaled_cosines,
    _slices,
    accumulator,
    cdiv,
    check_columns,
    check_dtype,
    dot_precision,
    on_its_device,
    scalar,
    whole_blocks,
)

PANELS = ("auto", "plain", "warp_specialised")


@triton.jit
def _products(b_acc, p_bx, p_by, k_from, k_to, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """acc + X[:, k_from:k_to] Y[:, k_from:k_to]^T, both bounds multiples of BLOCK_K."""
    for k in range(k_from, k_to, BLOCK_K):
        b_acc = _dot(tl.load(p_bx + k), tl.trans(tl.load(p_by + k)), b_acc, PRECISION)
    return b_acc


class Epilogue(NamedTuple):
    """What a tile's epilogue reads and writes, as one argument of the kernels; None where a launch has no such thing.

    Args:
        e: (L, R, C), rows `stride_e` apart. exponent: 0-d. shift: (L, R). scales: of (L, R) and (L, C). masks: thresholds are (L, R).
        row_part: (1 or 2, L, column tiles, R), the second for the greatest cosines. col_part: (L, row tiles, C).
        column_offset: number of the first column, as positives count them. levels: L.
    """

    e: torch.Tensor | None
    exponent: torch.Tensor
    shift: torch.Tensor
    scales: Scales | None
    masks: Masks
    row_part: torch.Tensor
    col_part: torch.Tensor | None
    rows: int
    columns: int
    stride_e: int
    column_offset: int
    levels: int


@triton.jit
def _finish(
    b_acc,
    i_r,
    i_c,
    level,
    out,
    ROW_MAX: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SLICES: tl.constexpr,
):
    """The epilogue: cosines of one tile and level -> E and partial sums in memory; `out` is an Epilogue."""
    ACC: tl.constexpr = b_acc.dtype
    WIDTH: tl.constexpr = BLOCK_C // SLICES
    R, C = out.rows, out.columns
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    tiles_r, tiles_c = tl.cdiv(R, BLOCK_R).to(tl.int64), tl.cdiv(C, BLOCK_C).to(tl.int64)
    o_row = o_r + level * R
    b_k = tl.load(out.exponent).to(ACC) * 1.4426950408889634  # exp(a) = exp2(a log2 e)
    # a row that takes no part has shift +inf, which makes its exponentials 0 without a comparison
    b_shift = tl.load(out.shift + o_row, mask=m_r, other=float("inf")).to(ACC) * 1.4426950408889634
    b_sum = tl.zeros((BLOCK_R,), ACC)
    b_max = tl.full((BLOCK_R,), -1e30, ACC)
    # finished in slices of columns: with all of E alive beside the accumulator the registers would spill
    b_slices = _slices(b_acc, SLICES)
    for i_slice in tl.static_range(SLICES):
        o_c = i_c * BLOCK_C + i_slice * WIDTH + tl.arange(0, WIDTH)
        m_c = o_c < C
        b_cos = _scaled_cosines(b_slices[i_slice], out.scales, o_row, o_c + level * C, m_r, m_c)
        b_cos = _drop(b_cos, out.masks, o_r, o_c, m_r, m_c, o_row, o_c + out.column_offset, EVEN_C, False)
        b_e = tl.exp2(b_cos * b_k - b_shift[:, None])
        if out.e is not None:
            p_be = out.e + o_row[:, None] * out.stride_e + o_c[None, :]
            tl.store(p_be, _narrow(b_e, out.e.dtype.element_ty), mask=m_r[:, None] & m_c[None, :])
        b_sum += tl.sum(b_e, 1)
        if ROW_MAX:
            b_max = tl.maximum(b_max, tl.max(b_cos, 1))
        if out.col_part is not None:
            tl.store(out.col_part + (level * tiles_r + i_r) * C + o_c, tl.sum(b_e, 0), mask=m_c)
    # partial results lie as (statistic, level, column tile, row): a row tile writes one contiguous piece
    p_part = out.row_part + (level * tiles_c + i_c) * R + o_r
    tl.store(p_part, b_sum, mask=m_r)
    if ROW_MAX:
        tl.store(p_part + out.levels * tiles_c * R, b_max, mask=m_r)


@triton.jit
def _tile(
    i_r,
    i_c,
    p_x,
    p_y,
    p_levels,
    out,
    D,
    stride_x,
    stride_y,
    ROW_MAX: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
):
    """One tile: its products, then its epilogue."""
    i_r, i_c = i_r.to(tl.int64), i_c.to(tl.int64)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_k = tl.arange(0, BLOCK_K)
    # rows past the end read row 0 instead of being masked in the hot loop; the epilogue drops them
    p_bx = p_x + tl.where(o_r < out.rows, o_r, 0)[:, None] * stride_x + o_k[None, :]
    p_by = p_y + tl.where(o_c < out.columns, o_c, 0)[:, None] * stride_y + o_k[None, :]
    b_acc = tl.zeros((BLOCK_R, BLOCK_C), out.row_part.dtype.element_ty)
    if p_levels is not None:
        # Matryoshka levels share one sweep: the accumulator of a prefix grows into that of the next
        k_from = tl.load(p_levels) * 0
        for level in range(out.levels):
            k_to = tl.load(p_levels + level)
            b_acc = _products(b_acc, p_bx, p_by, k_from, k_to, BLOCK_K, PRECISION)
            k_from = k_to
            # a zero that the compiler cannot tell: it would move every mask of the tile out of this loop, and spill them
            i_zero = level >> 30
            _finish(b_acc, i_r + i_zero, i_c + i_zero, level, out, ROW_MAX, EVEN_C, BLOCK_R, BLOCK_C, SLICES)
    else:
        b_acc = _products(b_acc, p_bx, p_by, 0, D, BLOCK_K, PRECISION)
        _finish(b_acc, i_r, i_c, 0, out, ROW_MAX, EVEN_C, BLOCK_R, BLOCK_C, SLICES)


@triton.jit
def _exp_panel_kernel(
    p_x,
    p_y,
    p_levels,
    p_redo,
    out,
    D,
    stride_x,
    stride_y,
    ROW_MAX: tl.constexpr,
    REDO: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):
    if p_redo is None:
        i_r, i_c = _grouped_tile(tl.program_id(0), tl.cdiv(out.rows, BLOCK_R), tl.cdiv(out.columns, BLOCK_C), GROUP)
        _tile(i_r, i_c, p_x, p_y, p_levels, out, D, stride_x, stride_y, ROW_MAX, EVEN_C, PRECISION, BLOCK_R, BLOCK_C, BLOCK_K, SLICES)
    else:
        # second launch for rows whose shift was unsafe: REDO programs a tile of rows, and nearly every one leaves here
        i_r, i_c = tl.program_id(0) // REDO, tl.program_id(0) % REDO
        if tl.load(p_redo + i_r) == 0:
            return
        while i_c < tl.cdiv(out.columns, BLOCK_C):
            _tile(i_r, i_c, p_x, p_y, p_levels, out, D, stride_x, stride_y, ROW_MAX, EVEN_C, PRECISION, BLOCK_R, BLOCK_C, BLOCK_K, SLICES)
            i_c += REDO


@dataclass
class ExpPanel:
    """What one launch leaves behind; levels L is 1 unless prefixes were asked for.

    Args:
        e: (L, R, C) exponentials in the operands' dtype, the positive and everything dropped 0; None where not stored.
        row_part: (1 or 2, L, column tiles, R) sums of a row's E before rounding; where asked for, greatest kept cosines, -1e30 for none.
        col_part: (L, row tiles, C) sums of a column of E; None unless asked for.
    """

    e: torch.Tensor | None
    row_part: torch.Tensor
    col_part: torch.Tensor | None

    @property
    def row_sum(self) -> torch.Tensor:
        """(L, R) sums of a row of E."""
        return self.row_part[0].sum(1)

    @property
    def row_max(self) -> torch.Tensor | None:
        """(L, R) greatest kept cosine, -inf where there is none; None unless asked for."""
        if len(self.row_part) == 1:
            return None
        levels, tiles, rows = self.row_part.shape[1:]
        if not tiles:
            return self.row_part.new_full((levels, rows), float("-inf"))
        best = self.row_part[1].amax(1)
        return torch.where(best <= -1e29, float("-inf"), best)

    @property
    def col_sum(self) -> torch.Tensor | None:
        """(L, C) sums of a column of E."""
        return None if self.col_part is None else self.col_part.sum(1)


def _takes(panel: str, arch: int, dtype: torch.dtype, plain: bool, columns: int) -> bool:
    """Whether the launch goes to the warp-specialised panel."""
    if panel not in PANELS:
        raise ValueError(f"panel: expected one of {', '.join(PANELS)}, got {panel!r}; auto is the default")
    if panel == "plain" or panel == "auto" and configs.tuned_as(arch) not in configs.WARP_SPECIALISED_FASTER:
        return False
    reason = warp_specialised.obstacle(arch, dtype, plain=plain, columns=columns)
    if reason and panel != "auto":
        raise ValueError(
            f"panel='warp_specialised': expected a launch that it can take, got one that it cannot: {reason}; use panel='auto'"
        )
    return not reason


@on_its_device
def exp_panel(
    x,
    y,
    *,
    scale,
    shift,
    out=None,
    row_scale=None,
    col_scale=None,
    positive=None,
    ids=(),
    threshold=None,
    keep=None,
    column_offset=0,
    row_max=False,
    col_sum=False,
    levels=None,
    redo=None,
    store=True,
    tile=None,
    panel="auto",
) -> ExpPanel:
    """E = exp(scale * cos - shift) of one panel of rows against all columns, with its sums.

    Args:
        x, y: (R, D), (C, D), one dtype: bfloat16, float16, float32 (float64 when interpreted). The width must be contiguous.
        scale: float or 0-d tensor, 1 / temperature plus hardness. A tensor is read on the device, without a host sync.
        shift: (R,) or (L, R), what is subtracted in the exponent; +inf takes a row out.
        out: (L, R, C) buffer in the operands' dtype, whose last dimension is contiguous; made when None.
        row_scale, col_scale: (L, R), (L, C) or without L: factors of the cosines, inverse norms; both or neither.
        positive: (R,) int64, the column (counted from `column_offset`) that is left out; -1 for none.
        ids: at most two pairs ((R,), (C,)) of int64; a column that bears its row's number is dropped. A row that is to match
            nothing brings a number that no column has.
        threshold: (R,) or (L, R) cosines above which a column is dropped. keep: (C,) bool, columns that are candidates. All vectors are
            contiguous: their pointers are taken, and no stride.
        row_max, col_sum: also reduce these.
        levels: int32 tensor of L ascending prefix widths on the device, for Matryoshka, each a multiple of the tile's block_k
            (the last may be D); None is the whole width.
        store: False leaves E unwritten, for the sums alone.
        redo: (row tiles,) int32; tiles whose entry is 0 are left as they are.
        tile: a `configs.Tile` instead of the table's.
        panel: "plain", "warp_specialised" (warp_specialised.py), or "auto": the latter where it was measured to be faster and can be had.

    Raises: ValueError for a dtype or a number of columns the kernels do not take, or a `panel` that cannot take the launch.
    Numerics: products and sums in float32 (float64 for float64).
    """
    check_dtype("exp_panel", x.dtype)
    check_columns("exp_panel", column_offset + len(y))
    rows, columns = len(x), len(y)
    acc = accumulator(x.dtype)
    device = x.device
    number = 1 if levels is None else len(levels)
    arch = configs.architecture(device)
    masks = bool(ids) or threshold is not None or keep is not None
    plain = not (masks or row_max or col_sum or levels is not None or redo is not None)
    special = _takes(panel, arch, x.dtype, plain, columns)
    if tile is None and special:
        tile = configs.warp_specialised(arch, row_scale is not None)
    elif tile is None:
        odd = columns % configs.PLAIN_COLUMNS != 0
        masked = (
            odd
            if levels is not None
            else configs.exp_panel_is_masked(arch, masks, row_scale is not None, row_max, col_sum, redo is not None, odd)
        )
        tile = configs.exp_panel(arch, x.element_size(), masked, levels is not None, odd)
    tiles_r, tiles_c = cdiv(rows, tile.block_r), cdiv(columns, tile.block_c)
    x, y = whole_blocks(x, tile.block_k), whole_blocks(y, tile.block_k)
    if out is None and store:
        out = torch.empty(number, rows, columns, dtype=x.dtype, device=device)
    row_part = torch.empty(1 + row_max, number, tiles_c, rows, dtype=acc, device=device)
    col_part = torch.empty(number, tiles_r, columns, dtype=acc, device=device) if col_sum else None
    epilogue = Epilogue(
        e=out if store else None,
        exponent=scalar(scale, acc, device),
        shift=shift if shift.dtype == acc else shift.to(acc),
        scales=Scales.of(row_scale, col_scale),
        masks=Masks.of(positive, ids, threshold, keep),
        row_part=row_part,
        col_part=col_part,
        rows=rows,
        columns=columns,
        stride_e=out.stride(-2) if store else 0,
        column_offset=column_offset,
        levels=number,
    )
    if rows and columns and special:
        warp_specialised.launch(x, y, epilogue, tile, configs.processors(device))
    elif rows and columns:
        _exp_panel_kernel[(tiles_r * (tiles_c if redo is None else REDO_PROGRAMS),)](
            x,
            y,
            levels,
            redo,
            epilogue,
            x.shape[1],
            x.stride(0),
            y.stride(0),
            ROW_MAX=row_max,
            REDO=REDO_PROGRAMS,
            EVEN_C=columns % tile.block_c == 0,
            PRECISION=dot_precision(x.dtype),
            GROUP=tile.group,
            SLICES=tile.slices,
            **tile.constants,
            **tile.options,
        )
    if redo is not None:
        # what it does is known to the device alone; nothing, in a batch without unsafe rows
        launch_log.note("exp_panel_redo", tiles_r * REDO_PROGRAMS, 0, 0, 0)
    else:
        launch_log.note(
            "exp_panel_warp_specialised" if special else "exp_panel",
            tiles_r * tiles_c,
            2 * tiles_r * tile.block_r * tiles_c * tile.block_c * x.shape[1],
            launch_log.size(x, y),
            launch_log.size(out if store else None, row_part, col_part),
        )
    return ExpPanel(out, row_part, col_part)
