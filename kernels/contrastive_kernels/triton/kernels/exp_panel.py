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

import torch
import triton
import triton.language as tl

from ...roofline import REDO_PROGRAMS
from .. import configs
from .. import launch_log as work
from . import warp_specialised
from .common import (
    INTERPRET,
    TRITON_DTYPE,
    _dot,
    _drop,
    _grouped_tile,
    _narrow,
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
def _products(b_acc, p_bx, p_by, k_from, k_to, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + X[:, k_from:k_to] Y[:, k_from:k_to]^T, both bounds multiples of BLOCK_K."""
    for k in range(k_from, k_to, BLOCK_K):
        b_acc = _dot(tl.load(p_bx + k), tl.trans(tl.load(p_by + k)), b_acc, PRECISION, UPCAST)
    return b_acc


@triton.jit
def _finish(
    b_acc,
    i_r,
    i_c,
    level,
    levels,
    p_e,
    p_exponent,
    p_shift,
    p_row_scale,
    p_col_scale,
    p_positive,
    p_row_id,
    p_col_id,
    p_row_id2,
    p_col_id2,
    p_threshold,
    p_keep,
    p_row_part,
    p_col_part,
    R,
    C,
    stride_e,
    column_offset,
    HAS_SCALE: tl.constexpr,
    HAS_POSITIVE: tl.constexpr,
    IDS: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    STORE: tl.constexpr,
    ROW_MAX: tl.constexpr,
    COL_SUM: tl.constexpr,
    EVEN_C: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SLICES: tl.constexpr,
):
    """The epilogue: cosines of one tile and level -> E and partial sums in memory."""
    ACC: tl.constexpr = b_acc.dtype
    WIDTH: tl.constexpr = BLOCK_C // SLICES
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    tiles_r, tiles_c = tl.cdiv(R, BLOCK_R).to(tl.int64), tl.cdiv(C, BLOCK_C).to(tl.int64)
    o_row = o_r + level * R
    b_k = tl.load(p_exponent).to(ACC) * 1.4426950408889634  # exp(a) = exp2(a log2 e)
    # a row that takes no part has shift +inf, which makes its exponentials 0 without a comparison
    b_shift = tl.load(p_shift + o_row, mask=m_r, other=float("inf")).to(ACC) * 1.4426950408889634
    b_sum = tl.zeros((BLOCK_R,), ACC)
    b_max = tl.full((BLOCK_R,), -1e30, ACC)
    # finished in slices of columns: with all of E alive beside the accumulator the registers would spill
    b_slices = _slices(b_acc, SLICES)
    for i_slice in tl.static_range(SLICES):
        o_c = i_c * BLOCK_C + i_slice * WIDTH + tl.arange(0, WIDTH)
        m_c = o_c < C
        b_cos = b_slices[i_slice]
        if HAS_SCALE:
            b_cos = b_cos * tl.load(p_row_scale + o_row, mask=m_r, other=0.0)[:, None]
            b_cos = b_cos * tl.load(p_col_scale + o_c + level * C, mask=m_c, other=0.0)[None, :]
        b_cos = _drop(
            b_cos,
            o_r,
            o_c,
            m_r,
            m_c,
            o_c + column_offset,
            p_positive,
            p_row_id,
            p_col_id,
            p_row_id2,
            p_col_id2,
            p_threshold + level * R,
            p_keep,
            HAS_POSITIVE,
            IDS,
            HAS_THRESHOLD,
            HAS_KEEP,
            EVEN_C,
            False,
        )
        b_e = tl.exp2(b_cos * b_k - b_shift[:, None])
        if STORE:
            p_be = p_e + o_row[:, None] * stride_e + o_c[None, :]
            tl.store(p_be, _narrow(b_e, p_e.dtype.element_ty, UPCAST), mask=m_r[:, None] & m_c[None, :])
        b_sum += tl.sum(b_e, 1)
        if ROW_MAX:
            b_max = tl.maximum(b_max, tl.max(b_cos, 1))
        if COL_SUM:
            tl.store(p_col_part + (level * tiles_r + i_r) * C + o_c, tl.sum(b_e, 0), mask=m_c)
    # partial results lie as (statistic, level, column tile, row): a row tile writes one contiguous piece
    p_part = p_row_part + (level * tiles_c + i_c) * R + o_r
    tl.store(p_part, b_sum, mask=m_r)
    if ROW_MAX:
        tl.store(p_part + levels * tiles_c * R, b_max, mask=m_r)


@triton.jit
def _tile(
    i_r,
    i_c,
    p_x,
    p_y,
    p_e,
    p_exponent,
    p_shift,
    p_row_scale,
    p_col_scale,
    p_positive,
    p_row_id,
    p_col_id,
    p_row_id2,
    p_col_id2,
    p_threshold,
    p_keep,
    p_row_part,
    p_col_part,
    p_levels,
    R,
    C,
    D,
    stride_x,
    stride_y,
    stride_e,
    column_offset,
    levels,
    PREFIXES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_POSITIVE: tl.constexpr,
    IDS: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    STORE: tl.constexpr,
    ROW_MAX: tl.constexpr,
    COL_SUM: tl.constexpr,
    EVEN_C: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
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
    p_bx = p_x + tl.where(o_r < R, o_r, 0)[:, None] * stride_x + o_k[None, :]
    p_by = p_y + tl.where(o_c < C, o_c, 0)[:, None] * stride_y + o_k[None, :]
    b_acc = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    if PREFIXES:
        # Matryoshka levels share one sweep: the accumulator of a prefix grows into that of the next
        k_from = tl.load(p_levels) * 0
        for level in range(levels):
            k_to = tl.load(p_levels + level)
            b_acc = _products(b_acc, p_bx, p_by, k_from, k_to, BLOCK_K, PRECISION, UPCAST)
            k_from = k_to
            # a zero that the compiler cannot tell: it would move every mask of the tile out of this loop, and spill them
            i_zero = level >> 30
            _finish(
                b_acc,
                i_r + i_zero,
                i_c + i_zero,
                level,
                levels,
                p_e,
                p_exponent,
                p_shift,
                p_row_scale,
                p_col_scale,
                p_positive,
                p_row_id,
                p_col_id,
                p_row_id2,
                p_col_id2,
                p_threshold,
                p_keep,
                p_row_part,
                p_col_part,
                R,
                C,
                stride_e,
                column_offset,
                HAS_SCALE,
                HAS_POSITIVE,
                IDS,
                HAS_THRESHOLD,
                HAS_KEEP,
                STORE,
                ROW_MAX,
                COL_SUM,
                EVEN_C,
                UPCAST,
                BLOCK_R,
                BLOCK_C,
                SLICES,
            )
    else:
        b_acc = _products(b_acc, p_bx, p_by, 0, D, BLOCK_K, PRECISION, UPCAST)
        _finish(
            b_acc,
            i_r,
            i_c,
            0,
            1,
            p_e,
            p_exponent,
            p_shift,
            p_row_scale,
            p_col_scale,
            p_positive,
            p_row_id,
            p_col_id,
            p_row_id2,
            p_col_id2,
            p_threshold,
            p_keep,
            p_row_part,
            p_col_part,
            R,
            C,
            stride_e,
            column_offset,
            HAS_SCALE,
            HAS_POSITIVE,
            IDS,
            HAS_THRESHOLD,
            HAS_KEEP,
            STORE,
            ROW_MAX,
            COL_SUM,
            EVEN_C,
            UPCAST,
            BLOCK_R,
            BLOCK_C,
            SLICES,
        )


@triton.jit
def _exp_panel_kernel(
    p_x,
    p_y,
    p_e,
    p_exponent,
    p_shift,
    p_row_scale,
    p_col_scale,
    p_positive,
    p_row_id,
    p_col_id,
    p_row_id2,
    p_col_id2,
    p_threshold,
    p_keep,
    p_row_part,
    p_col_part,
    p_levels,
    p_redo,
    R,
    C,
    D,
    stride_x,
    stride_y,
    stride_e,
    column_offset,
    levels,
    PREFIXES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_POSITIVE: tl.constexpr,
    IDS: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    STORE: tl.constexpr,
    ROW_MAX: tl.constexpr,
    COL_SUM: tl.constexpr,
    REDO: tl.constexpr,
    EVEN_C: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SLICES: tl.constexpr,
):
    if REDO:
        # second launch for rows whose shift was unsafe: few programs, and nearly every one leaves here
        i_r = tl.program_id(0) // REDO
        if tl.load(p_redo + i_r) == 0:
            return
        i_c = tl.program_id(0) % REDO
        while i_c < tl.cdiv(C, BLOCK_C):
            _tile(
                i_r,
                i_c,
                p_x,
                p_y,
                p_e,
                p_exponent,
                p_shift,
                p_row_scale,
                p_col_scale,
                p_positive,
                p_row_id,
                p_col_id,
                p_row_id2,
                p_col_id2,
                p_threshold,
                p_keep,
                p_row_part,
                p_col_part,
                p_levels,
                R,
                C,
                D,
                stride_x,
                stride_y,
                stride_e,
                column_offset,
                levels,
                PREFIXES,
                HAS_SCALE,
                HAS_POSITIVE,
                IDS,
                HAS_THRESHOLD,
                HAS_KEEP,
                STORE,
                ROW_MAX,
                COL_SUM,
                EVEN_C,
                ACC,
                PRECISION,
                UPCAST,
                BLOCK_R,
                BLOCK_C,
                BLOCK_K,
                SLICES,
            )
            i_c += REDO
    else:
        i_r, i_c = _grouped_tile(tl.program_id(0), tl.cdiv(R, BLOCK_R), tl.cdiv(C, BLOCK_C), GROUP)
        _tile(
            i_r,
            i_c,
            p_x,
            p_y,
            p_e,
            p_exponent,
            p_shift,
            p_row_scale,
            p_col_scale,
            p_positive,
            p_row_id,
            p_col_id,
            p_row_id2,
            p_col_id2,
            p_threshold,
            p_keep,
            p_row_part,
            p_col_part,
            p_levels,
            R,
            C,
            D,
            stride_x,
            stride_y,
            stride_e,
            column_offset,
            levels,
            PREFIXES,
            HAS_SCALE,
            HAS_POSITIVE,
            IDS,
            HAS_THRESHOLD,
            HAS_KEEP,
            STORE,
            ROW_MAX,
            COL_SUM,
            EVEN_C,
            ACC,
            PRECISION,
            UPCAST,
            BLOCK_R,
            BLOCK_C,
            BLOCK_K,
            SLICES,
        )


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
    rows, columns, width = len(x), len(y), x.shape[1]
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
        rich = (
            odd
            if levels is not None
            else configs.exp_panel_is_rich(arch, masks, row_scale is not None, row_max, col_sum, redo is not None, odd)
        )
        tile = configs.exp_panel(arch, x.element_size(), rich, levels is not None, odd)
    tiles_r, tiles_c = cdiv(rows, tile.block_r), cdiv(columns, tile.block_c)
    x, y = whole_blocks(x, tile.block_k), whole_blocks(y, tile.block_k)
    width = x.shape[1]
    if out is None and store:
        out = torch.empty(number, rows, columns, dtype=x.dtype, device=device)
    exponent = scalar(scale, acc, device)
    row_part = torch.empty(1 + row_max, number, tiles_c, rows, dtype=acc, device=device)
    col_part = torch.empty(number, tiles_r, columns, dtype=acc, device=device) if col_sum else x
    (row_id, col_id), (row_id2, col_id2) = (*ids, (x, x), (x, x))[:2]
    if rows and columns and special:
        warp_specialised.launch(
            x,
            y,
            out[0] if store else None,
            exponent,
            shift.to(acc),
            row_scale,
            col_scale,
            positive,
            row_part[0, 0],
            column_offset,
            tile,
            configs.processors(device),
        )
    elif rows and columns:
        _exp_panel_kernel[(tiles_r * (REDO_PROGRAMS if redo is not None else tiles_c),)](
            x,
            y,
            out if store else x,
            exponent,
            shift if shift.dtype == acc else shift.to(acc),
            x if row_scale is None else row_scale,
            x if col_scale is None else col_scale,
            x if positive is None else positive,
            row_id,
            col_id,
            row_id2,
            col_id2,
            x if threshold is None else threshold,
            x if keep is None else keep.view(torch.uint8),
            row_part,
            col_part,
            x if levels is None else levels,
            x if redo is None else redo,
            rows,
            columns,
            width,
            x.stride(0),
            y.stride(0),
            out.stride(-2) if store else 0,
            column_offset,
            number,
            PREFIXES=levels is not None,
            HAS_SCALE=row_scale is not None,
            HAS_POSITIVE=positive is not None,
            IDS=len(ids),
            HAS_THRESHOLD=threshold is not None,
            HAS_KEEP=keep is not None,
            STORE=store,
            ROW_MAX=row_max,
            COL_SUM=col_sum,
            REDO=0 if redo is None else REDO_PROGRAMS,
            EVEN_C=columns % tile.block_c == 0,
            ACC=TRITON_DTYPE[acc],
            PRECISION=dot_precision(x.dtype),
            UPCAST=INTERPRET,
            GROUP=tile.group,
            SLICES=tile.slices,
            **tile.constants,
            **tile.options,
        )
    if redo is not None:
        # what it does is known to the device alone; nothing, in a batch without unsafe rows
        work.note("exp_panel_redo", tiles_r * REDO_PROGRAMS, 0, 0, 0)
    else:
        work.note(
            "exp_panel_warp_specialised" if special else "exp_panel",
            tiles_r * tiles_c,
            2 * tiles_r * tile.block_r * tiles_c * tile.block_c * cdiv(width, tile.block_k) * tile.block_k,
            work.size(x, y),
            work.size(out if store else None, row_part) + (work.size(col_part) if col_sum else 0),
        )
    return ExpPanel(out, row_part, col_part if col_sum else None)
