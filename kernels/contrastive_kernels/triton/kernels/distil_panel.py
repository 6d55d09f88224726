"""Two models' softmaxes over a panel of cosines that library products left in float32, and the difference of their probabilities.

    pass 1   per row, of the student and of the teacher: greatest cosine, sum of exp(logit - its logit); and the sum of the
             teacher's exponentials times (teacher's logit - student's)
    pass 2   G_ij = a_i exp(student_ij - shift_i) - b_i exp(teacher_ij - shift'_i), in the products' type; 0 at the row's own target

Bytes an element: 8 written by the products, 8 read twice, 2 written here in 16-bit types: 26. Shifts are the row's own maxima, so no
exponent is ever out of range. A row is reduced by one program, in order: deterministic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import configs, launch_log
from .chunk_panel import _masked_cosines
from .common import Masks, Scales, _narrow, cdiv, check_columns, on_its_device, scalar


class Cosines(NamedTuple):
    """One model's part of a launch: cosines (R, C) float32 before norms, what multiplies a cosine in the logit (0-d), and the norms."""

    cos: torch.Tensor
    exponent: torch.Tensor
    scales: Scales | None

    @classmethod
    def of(cls, cos, scale, row_scale=None, col_scale=None) -> "Cosines":
        return cls(cos, scalar(scale, cos.dtype, cos.device), Scales.of(row_scale, col_scale))


@triton.jit
def _tile(model, stride, masks, o_r, o_c, m_r, m_c):
    return _masked_cosines(model.cos, model.scales, masks, o_r, o_c, m_r, m_c, stride, 0)


@triton.jit
def _grown(b_cos, b_best, b_total, b_k):
    """One more tile of a running softmax: greatest cosine, exponentials relative to it, their sum, and what older sums shrink by."""
    b_new = tl.maximum(b_best, tl.max(b_cos, 1))
    # exp2((-1e30 - -1e30) k) would be 1 in a row that has no candidate yet: such elements are excluded by value; a NaN is not
    b_e = tl.where(b_cos <= -1e29, 0.0, tl.exp2((b_cos - b_new[:, None]) * b_k))
    b_shrink = tl.exp2((b_best - b_new) * b_k)
    return b_new, b_e, b_total * b_shrink + tl.sum(b_e, 1), b_shrink


@triton.jit
def _distil_reduce_kernel(
    student, teacher, masks, p_out, R, C, stride_student, stride_teacher, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    ACC: tl.constexpr = p_out.dtype.element_ty
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    b_ks, b_kt = tl.load(student.exponent).to(ACC), tl.load(teacher.exponent).to(ACC)
    b_best_s, b_best_t = tl.full((BLOCK_R,), -1e30, ACC), tl.full((BLOCK_R,), -1e30, ACC)
    b_total_s, b_total_t, b_gap = tl.zeros((BLOCK_R,), ACC), tl.zeros((BLOCK_R,), ACC), tl.zeros((BLOCK_R,), ACC)
    for first in range(0, C, BLOCK_C):
        o_c = first + tl.arange(0, BLOCK_C).to(tl.int64)
        m_c = o_c < C
        b_s = _tile(student, stride_student, masks, o_r, o_c, m_r, m_c)
        b_t = _tile(teacher, stride_teacher, masks, o_r, o_c, m_r, m_c)
        b_best_s, _, b_total_s, _ = _grown(b_s, b_best_s, b_total_s, b_ks * 1.4426950408889634)
        b_best_t, b_e, b_total_t, b_shrink = _grown(b_t, b_best_t, b_total_t, b_kt * 1.4426950408889634)
        b_logit_gap = tl.where(b_t <= -1e29, 0.0, b_t * b_kt - b_s * b_ks)
        b_gap = b_gap * b_shrink + tl.sum(b_e * b_logit_gap, 1)
    tl.store(p_out + o_r, b_best_s, mask=m_r)
    tl.store(p_out + R + o_r, b_total_s, mask=m_r)
    tl.store(p_out + 2 * R + o_r, b_best_t, mask=m_r)
    tl.store(p_out + 3 * R + o_r, b_total_t, mask=m_r)
    tl.store(p_out + 4 * R + o_r, b_gap, mask=m_r)


@triton.jit
def _probabilities(b_cos, p_best, p_factor, b_k, o_r, m_r):
    b_best, b_factor = tl.load(p_best + o_r, mask=m_r, other=0.0), tl.load(p_factor + o_r, mask=m_r, other=0.0)
    return tl.exp2((b_cos - b_best[:, None]) * b_k) * b_factor[:, None]


@triton.jit
def _distil_write_kernel(
    student,
    teacher,
    masks,
    p_best_s,
    p_best_t,
    p_factor_s,
    p_factor_t,
    p_out,
    R,
    C,
    stride_student,
    stride_teacher,
    stride_out,
    GAIN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ACC: tl.constexpr = p_best_s.dtype.element_ty
    tiles_c = tl.cdiv(C, BLOCK_C)
    i_r, i_c = (tl.program_id(0) // tiles_c).to(tl.int64), (tl.program_id(0) % tiles_c).to(tl.int64)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_r, m_c = o_r < R, o_c < C
    b_s = _tile(student, stride_student, masks, o_r, o_c, m_r, m_c)
    b_t = _tile(teacher, stride_teacher, masks, o_r, o_c, m_r, m_c)
    b_g = _probabilities(b_s, p_best_s, p_factor_s, tl.load(student.exponent).to(ACC) * 1.4426950408889634, o_r, m_r)
    b_g -= _probabilities(b_t, p_best_t, p_factor_t, tl.load(teacher.exponent).to(ACC) * 1.4426950408889634, o_r, m_r)
    b_g = tl.where(b_s <= -1e29, 0.0, b_g * GAIN)
    p_bout = p_out + o_r[:, None] * stride_out + o_c[None, :]
    tl.store(p_bout, _narrow(b_g, p_out.dtype.element_ty), mask=m_r[:, None] & m_c[None, :])


class Reduction(NamedTuple):
    """(R,) each. best: greatest cosine, -1e30 where a row has no candidate. total: sum of exp(logit - its logit).

    gap: sum of the teacher's exponentials times (teacher's logit - student's).
    """

    best_student: torch.Tensor
    total_student: torch.Tensor
    best_teacher: torch.Tensor
    total_teacher: torch.Tensor
    gap: torch.Tensor


@on_its_device
def distil_reduce(student_cos, teacher_cos, *, student, teacher, positive, keep=None, tile=None) -> Reduction:
    """First pass over both models' cosines (R, C).

    Args: student, teacher: `Cosines`. positive: (R,) int64 column that is left out of a row, -1 for none. keep: (C,) bool or None.
    """
    rows, columns = student_cos.shape
    check_columns("distil_reduce", columns)
    out = torch.empty(5, rows, dtype=student_cos.dtype, device=student_cos.device)
    tile = tile or configs.DISTIL_REDUCE
    grid = cdiv(rows, tile.block_r)
    _distil_reduce_kernel[(grid,)](
        student,
        teacher,
        Masks.of(positive, keep=keep),
        out,
        rows,
        columns,
        student_cos.stride(0),
        teacher_cos.stride(0),
        BLOCK_R=tile.block_r,
        BLOCK_C=tile.block_c,
        **tile.options,
    )
    launch_log.note("distil_reduce", grid, 0, launch_log.size(student_cos, teacher_cos), launch_log.size(out))
    return Reduction(*out)


@on_its_device
def distil_write(student_cos, teacher_cos, *, student, teacher, positive, keep=None, best, factors, out, gain=1.0, tile=None) -> None:
    """Second pass: out (R, C) = gain (factors[0] exp(student - its greatest) - factors[1] exp(teacher - its greatest)).

    Args: as for `distil_reduce`; best, factors: (R,) of the student and of the teacher. gain: a number.
    """
    rows, columns = student_cos.shape
    tile = tile or configs.DISTIL_WRITE
    grid = cdiv(rows, tile.block_r) * cdiv(columns, tile.block_c)
    _distil_write_kernel[(grid,)](
        student,
        teacher,
        Masks.of(positive, keep=keep),
        *best,
        *factors,
        out,
        rows,
        columns,
        student_cos.stride(0),
        teacher_cos.stride(0),
        out.stride(0),
        GAIN=float(gain),
        BLOCK_R=tile.block_r,
        BLOCK_C=tile.block_c,
        **tile.options,
    )
    launch_log.note("distil_write", grid, 0, launch_log.size(student_cos, teacher_cos), launch_log.size(out))
