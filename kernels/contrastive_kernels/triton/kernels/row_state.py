"""What a direction knows of each of its rows, and the two kernels that work it out between the products.

    mark      greatest cosines of a panel  ->  the shift with which unsafe rows are done again, and which tiles of rows hold one
    finish    a panel's partial sums, and the sums that came before (hard negatives, earlier shards)  ->
                  sums Z and shift c            loss_i = w log(1 + e^x),  x = c + log Z - s_positive
                  factor_i = w / (T (Z + e^(s_positive - c)))             what turns E = exp(s - c) into d loss / d cosine
                  positive_i = -w (1 - p_positive) / T                    d loss / d cosine of the positive

Partial sums are added in a fixed order: deterministic. A NaN among the sums stays one. Bytes: the partial sums once, some ten numbers
a row written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...core.softmax import RowResult, RowSums
from .. import launch_log
from .common import cdiv, on_its_device

# A row's greatest logit less the shift: e^65 * 2^25 columns is inside float32, e^-40 leaves 47 nats below the greatest.
SAFE_ABOVE, SAFE_BELOW = 65.0, -40.0
BLOCK, PARTS = 32, 32  # rows of a program, and partial results of each that are on their way at a time
MARK_PARTS = 8  # where a program has the rows of a whole tile
RESULTS = 6


@dataclass
class RowState:
    """Sums and results of n rows, filled panel by panel. All (n,), views of two matrices.

    Args:
        sums: running sums of the negatives, (5, n) in `sums.matrix`.
        results: (6, n): weighted loss, log-sum-exp, factor, positive, label smoothing's share, the shift of `factor`.
    """

    sums: RowSums
    results: torch.Tensor
    smoothing: float

    @classmethod
    def unfilled(cls, rows: int, dtype, device, smoothing: float, sums: RowSums | None = None) -> RowState:
        """sums: running sums that this state goes on with, made by `RowSums.empty`."""
        sums = RowSums.unfilled(rows, dtype, device, bool(smoothing)) if sums is None else sums
        return cls(sums, torch.empty(RESULTS, rows, dtype=dtype, device=device), smoothing)

    def load(self, sums: RowSums) -> None:
        """Start from other sums, a row's hard negatives."""
        fields = [sums.shift, sums.total, sums.best] + ([sums.logits, sums.count] if self.smoothing else [])
        torch.stack(fields, out=self.sums.matrix[: len(fields)])

    @property
    def factor(self) -> torch.Tensor:
        """d loss / d cosine of a negative over its exponential, to be multiplied with E = exp(logit - shift)."""
        return self.results[2]

    @property
    def positive(self) -> torch.Tensor:
        """d loss / d cosine of the row's positive."""
        return self.results[3]

    @property
    def smooth(self) -> torch.Tensor:
        return self.results[4]

    @property
    def shift(self) -> torch.Tensor:
        """The shift that `factor` belongs to; +inf where a row has no part in the products."""
        return self.results[5]

    def result(self) -> RowResult:
        """For what is computed beside the kernels: `loss` and `log_sum` are not kept, `weighted` is."""
        return RowResult(None, None, self.results[1], self.positive, self.smooth if self.smoothing else None, self.results[0])


@dataclass
class Parts:
    """Partial sums of one panel as launches left them, (T, R) each, T of every row.

    Args:
        total: of exp(logit - shift). shift: (R,), +inf where a row takes no part. best: greatest cosines, -1e29 and less for none; or None.
        redo_shift, redo_tiles, redo_total: of rows done again their shift (equal to `shift` elsewhere), which tiles of `block_r` rows hold
            one, and their sums.
        logits, count: (R,) sum and number of the logits, for label smoothing.
    """

    total: torch.Tensor
    shift: torch.Tensor
    best: torch.Tensor | None = None
    redo_shift: torch.Tensor | None = None
    redo_tiles: torch.Tensor | None = None
    redo_total: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    count: torch.Tensor | None = None
    block_r: int = BLOCK


@triton.jit
def _sum_parts(p_part, o_r, m_r, R, parts, ACC: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """(BLOCK,) sums over (parts, R)."""
    b_sum = tl.zeros((PARTS, BLOCK), ACC)
    for first in range(0, parts, PARTS):
        o_p = first + tl.arange(0, PARTS).to(tl.int64)
        b_sum += tl.load(p_part + o_p[:, None] * R + o_r[None, :], mask=(o_p < parts)[:, None] & m_r[None, :], other=0.0)
    return tl.sum(b_sum, 0)


@triton.jit
def _greatest_part(p_part, o_r, m_r, R, parts, ACC: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """(BLOCK,) greatest over (parts, R), -1e30 where there is none."""
    b_top = tl.full((PARTS, BLOCK), -1e30, ACC)
    for first in range(0, parts, PARTS):
        o_p = first + tl.arange(0, PARTS).to(tl.int64)
        b_top = tl.maximum(
            b_top, tl.load(p_part + o_p[:, None] * R + o_r[None, :], mask=(o_p < parts)[:, None] & m_r[None, :], other=-1e30)
        )
    return tl.max(b_top, 0)


@triton.jit
def _mark_sums_kernel(p_total, p_shift, p_redo_tiles, R, parts, above, below, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    o_r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < R
    b_total = _sum_parts(p_total, o_r, m_r, R, parts, p_shift.dtype.element_ty, BLOCK, PARTS)
    b_shift = tl.load(p_shift + o_r, mask=m_r, other=float("inf"))
    b_unsafe = ((b_total > above) | (b_total < below)) & (b_shift < float("inf"))
    tl.store(p_redo_tiles + tl.program_id(0), tl.max(b_unsafe.to(tl.int32), 0))


@triton.jit
def _mark_kernel(
    p_best, p_shift, p_exponent, p_within, p_redo_shift, p_redo_tiles, R, parts, above, below, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    ACC: tl.constexpr = p_shift.dtype.element_ty
    o_r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < R
    b_best = _greatest_part(p_best, o_r, m_r, R, parts, ACC, BLOCK, PARTS)
    b_shift = tl.load(p_shift + o_r, mask=m_r, other=float("inf"))
    b_top = b_best * tl.load(p_exponent).to(ACC)
    b_off = b_top - b_shift
    b_unsafe = ((b_off > above) | (b_off < below)) & (b_best > -1e29) & (b_shift < float("inf"))
    if p_within is not None:
        # of other tiles there are no maxima: what was read is unwritten memory
        b_unsafe = b_unsafe & (tl.load(p_within + tl.program_id(0)) != 0)
    tl.store(p_redo_shift + o_r, tl.where(b_unsafe, b_top, b_shift), mask=m_r)
    tl.store(p_redo_tiles + tl.program_id(0), tl.max(b_unsafe.to(tl.int32), 0))


@triton.jit
def _log1p(b_x):
    """log(1 + x) of 0 <= x <= 1 to the last digits: 2 atanh(x / (2 + x)), whose series loses nothing where x is small."""
    b_s = b_x / (2.0 + b_x)
    b_square = b_s * b_s
    b_sum = b_square * 0.0 + 1.0 / 37.0
    for i in tl.static_range(18):
        b_sum = b_sum * b_square + 1.0 / (35.0 - 2.0 * i)
    return 2.0 * b_s * b_sum


@triton.jit
def _finish_kernel(
    p_sums,
    p_results,
    p_total,
    p_shift,
    p_best,
    p_redo_shift,
    p_redo_tiles,
    p_redo_total,
    p_logits,
    p_count,
    p_positive,
    p_inverse_temperature,
    p_weight,
    p_active,
    R,
    N,
    parts,
    redo_parts,
    best_parts,
    mark_rows,
    HAS_PRIOR: tl.constexpr,
    OWN_SHIFT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    ACC: tl.constexpr = p_sums.dtype.element_ty
    SMOOTH: tl.constexpr = SMOOTHING > 0
    o_r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < R
    b_total = tl.zeros((BLOCK,), ACC)
    b_shift = tl.full((BLOCK,), float("-inf"), ACC)
    b_best = tl.full((BLOCK,), float("-inf"), ACC)
    b_logits = tl.zeros((BLOCK,), ACC)
    b_count = tl.zeros((BLOCK,), ACC)
    b_written = b_shift  # the shift of the exponentials in memory
    if p_total is not None:
        b_total = _sum_parts(p_total, o_r, m_r, R, parts, ACC, BLOCK, PARTS)
        b_written = tl.load(p_shift + o_r, mask=m_r, other=float("inf"))
        if p_best is not None:
            b_best = _greatest_part(p_best, o_r, m_r, R, best_parts, ACC, BLOCK, PARTS)
            b_best = tl.where(b_best > -1e29, b_best, float("-inf"))
        if p_redo_total is not None:
            if tl.load(p_redo_tiles + tl.program_id(0) * BLOCK // mark_rows) != 0:
                b_redo_total = _sum_parts(p_redo_total, o_r, m_r, R, redo_parts, ACC, BLOCK, PARTS)
                b_redo_shift = tl.load(p_redo_shift + o_r, mask=m_r, other=float("inf"))
                b_total = tl.where(b_redo_shift != b_written, b_redo_total, b_total)
                b_written = b_redo_shift
        if SMOOTH:
            b_logits = tl.load(p_logits + o_r, mask=m_r, other=0.0)
            b_count = tl.load(p_count + o_r, mask=m_r, other=0.0)
        if p_active is not None:
            b_active = tl.load(p_active + o_r, mask=m_r, other=0) != 0
            b_total = tl.where(b_active, b_total, 0.0)
            b_best = tl.where(b_active, b_best, float("-inf"))
            b_logits = tl.where(b_active, b_logits, 0.0)
            b_count = tl.where(b_active, b_count, 0.0)
        b_shift = tl.where(b_total == 0, float("-inf"), b_written)
    if HAS_PRIOR:
        b_before = tl.load(p_sums + o_r, mask=m_r, other=float("-inf"))
        b_top = tl.maximum(b_shift, b_before)
        b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_total = tl.load(p_sums + N + o_r, mask=m_r, other=0.0) * tl.exp(b_before - b_base) + b_total * tl.exp(b_shift - b_base)
        b_shift = b_top
        b_best = tl.maximum(b_best, tl.load(p_sums + 2 * N + o_r, mask=m_r, other=float("-inf")))
        if SMOOTH:
            b_logits += tl.load(p_sums + 3 * N + o_r, mask=m_r, other=0.0)
            b_count += tl.load(p_sums + 4 * N + o_r, mask=m_r, other=0.0)
    if p_total is not None:
        tl.store(p_sums + o_r, b_shift, mask=m_r)
        tl.store(p_sums + N + o_r, b_total, mask=m_r)
        tl.store(p_sums + 2 * N + o_r, b_best, mask=m_r)
        if SMOOTH:
            tl.store(p_sums + 3 * N + o_r, b_logits, mask=m_r)
            tl.store(p_sums + 4 * N + o_r, b_count, mask=m_r)
    if p_inverse_temperature is not None:
        b_inverse = tl.load(p_inverse_temperature).to(ACC)
        b_weight = tl.load(p_weight + o_r, mask=m_r, other=0.0)
        b_positive = tl.load(p_positive + o_r, mask=m_r, other=0.0) * b_inverse
        b_none = b_total == 0
        b_base = tl.where(b_shift == float("-inf"), 0.0, b_shift)
        b_x = b_shift + tl.log(tl.where(b_none, 1.0, b_total)) - b_positive
        b_loss = tl.maximum(b_x, 0.0) + _log1p(tl.exp(-tl.abs(b_x)))
        b_loss = tl.where(b_x != b_x, b_x, b_loss)  # a maximum would lose a NaN
        b_lse = b_positive + b_loss
        # over all candidates, the positive too: a quotient of sums, exact to rounding where exp(shift - lse) would carry the error of lse
        b_all = tl.where(b_none, 1.0, b_total + tl.exp(b_positive - b_base))
        b_slope = -tl.where(b_none, 0.0, b_total / b_all)
        b_last = b_base if OWN_SHIFT else b_written
        # a row whose only negatives are hard ones may have a smaller shift than E's: its E is 0, and the factor must not be infinite
        b_factor = tl.where(b_none, 0.0, tl.exp(tl.minimum(tl.where(b_none, 0.0, b_last - b_base), 0.0)) / b_all) / GAIN
        if SMOOTH:
            b_smooth = SMOOTHING / (b_count + 1.0)
            b_loss += SMOOTHING * b_positive - b_smooth * (b_positive + b_logits)
            b_slope += SMOOTHING - b_smooth
            # the exponentials are written anew as d loss / d logit: exp(logit - lse) - smooth
            b_factor = b_factor * 0.0 + 1.0 / GAIN
            b_last = b_lse
        b_inactive = b_none
        if p_active is not None:
            b_inactive = b_inactive | (tl.load(p_active + o_r, mask=m_r, other=0) == 0)
        tl.store(p_results + o_r, tl.where(b_weight != 0, b_weight * b_loss, 0.0), mask=m_r)
        tl.store(p_results + N + o_r, b_lse, mask=m_r)
        tl.store(p_results + 2 * N + o_r, b_factor * b_weight * b_inverse, mask=m_r)
        tl.store(p_results + 3 * N + o_r, b_slope * b_weight * b_inverse, mask=m_r)
        if SMOOTH:
            tl.store(p_results + 4 * N + o_r, b_smooth, mask=m_r)
        tl.store(p_results + 5 * N + o_r, tl.where(b_inactive, float("inf"), b_last), mask=m_r)


@on_its_device
def mark_by_sums(total: torch.Tensor, shift: torch.Tensor, block_r: int) -> torch.Tensor:
    """(row tiles,) int32, not 0 where a tile holds a row whose shift may be unsafe, told from sums of exp(logit - shift) alone.

    A sum of at most e^65 has no greater term. One of at least e^-40 over 2^25 columns has a term of e^-57 or more, and what float32 and
    bfloat16 lost below e^-87 is at most 2^25 e^-47 = 1e-13 of the sum. So a row that is not marked is right to rounding; one that is may
    be, which its maximum then tells.

    Args: total: (T, R) partial sums. shift: (R,), +inf where a row takes no part. block_r: rows of a tile of the launch to come.
    """
    parts, rows = total.shape
    tiles = cdiv(rows, block_r)
    marks = torch.empty(tiles, dtype=torch.int32, device=shift.device)
    if rows:
        _mark_sums_kernel[(tiles,)](
            total, shift, marks, rows, parts, math.exp(SAFE_ABOVE), math.exp(SAFE_BELOW), BLOCK=block_r, PARTS=MARK_PARTS, num_warps=4
        )
    launch_log.note("mark_rows", tiles, 0, launch_log.size(total, shift), 0)
    return marks


@on_its_device
def mark(
    best: torch.Tensor, shift: torch.Tensor, exponent: torch.Tensor, block_r: int, within: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """((R,) own shift of unsafe rows and `shift` of the others, (row tiles,) int32 that is 0 where a tile has no unsafe row).

    Args: best: (T, R) greatest cosines. shift: (R,). exponent: 0-d, logit per cosine. block_r: rows of a tile of the launch to come.
        within: (row tiles,) int32 from `mark_by_sums`: other tiles have no unsafe row, and no maxima.
    """
    parts, rows = best.shape
    tiles = cdiv(rows, block_r)
    redo_shift = torch.empty(rows, dtype=shift.dtype, device=shift.device)
    marks = torch.empty(tiles, dtype=torch.int32, device=shift.device)
    if rows:
        _mark_kernel[(tiles,)](
            best,
            shift,
            exponent,
            within,
            redo_shift,
            marks,
            rows,
            parts,
            SAFE_ABOVE,
            SAFE_BELOW,
            BLOCK=block_r,
            PARTS=MARK_PARTS,
            num_warps=4,
        )
    launch_log.note("mark_rows", tiles, 0, launch_log.size(best, shift), launch_log.size(redo_shift))
    return redo_shift, marks


@on_its_device
def finish(
    state: RowState,
    rows: slice,
    parts: Parts | None,
    direction,
    inverse_temperature: torch.Tensor | None,
    *,
    prior: bool,
    own_shift: bool = False,
    gain: float = 1.0,
) -> None:
    """Take a panel's partial sums into rows `rows` of `state`; with a temperature also work out these rows, their sums being complete.

    Args:
        parts: of the panel, or None where nothing is to be added. prior: the state's sums hold something already.
        direction: `problem.Direction`: the positives' cosines, weights and active rows.
        inverse_temperature: 0-d, or None for the sums alone.
        own_shift: `factor` belongs to E = exp(logit - shift) with the rows' own shift, which the caller will write; else to E as it
            was written. With label smoothing it belongs to exp(logit - lse) - smooth. gain: the caller's E is so many times greater.
    """
    matrix, results = state.sums.matrix[:, rows], state.results[:, rows]
    count = results.shape[1]
    active, given, finishing = direction.active, parts or Parts(None, None), inverse_temperature is not None
    block = min(BLOCK, given.block_r)  # of rows that share a mark
    programs = cdiv(count, block)
    if not count:
        return

    _finish_kernel[(programs,)](
        matrix,
        results,
        given.total,
        given.shift,
        given.best,
        given.redo_shift,
        given.redo_tiles,
        given.redo_total,
        given.logits,
        given.count,
        direction.positive[rows] if finishing else None,
        inverse_temperature,
        direction.weight[rows] if finishing else None,
        None if active is None else active[rows].view(torch.uint8),
        count,
        matrix.stride(0),
        0 if given.total is None else len(given.total),
        0 if given.redo_total is None else len(given.redo_total),
        0 if given.best is None else len(given.best),
        given.block_r,
        HAS_PRIOR=prior,
        OWN_SHIFT=own_shift,
        SMOOTHING=float(state.smoothing),
        GAIN=float(gain),
        BLOCK=block,
        PARTS=PARTS,
        num_warps=4,
    )
    item = results.element_size()
    read = launch_log.size(given.total, given.shift, given.best) + count * item * ((5 if prior else 0) + 2)
    launch_log.note("finish_rows", programs, 0, read, count * item * (3 + RESULTS * finishing))
