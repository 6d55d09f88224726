"""Both directions of `symmetric` from one kept panel: E = exp(s - c) once, its row sums are the one softmax's, its column sums the other's.

    G_ij = (f_i + h_j) E_ij        in place, f and h the rows' factors of the two directions
    d_query = G T                  d_target = G^T Q

6 N M D FLOP where two directions take 12. One shift c for all rows and columns: safe only where no cosine times 1 / temperature can
exceed 73, which the host has to know: it does for normalize=True with a temperature that is a number (normalising rows that have unit
length already costs next to nothing). Otherwise it would have to look, and wait for the device: validate=True lets it, being that
waits anyway; else a GPU takes two sweeps. `obstacle` says what keeps a problem from it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import dispatch
from ..core.operands import norms
from . import configs, launch_log
from .gradient_writer import GradientWriter
from .kernels.common import INTERPRET, TRITON_DTYPE, _narrow, accumulator, cdiv, on_its_device, scalar
from .kernels.exp_panel import exp_panel
from .kernels.row_state import Parts, RowState, finish
from .operand_views import OperandViews
from .panel_sums import LARGEST_LOGIT, ROUNDING, SHIFT_BELOW_TOP
from .products import matmul


@triton.jit
def _combine_kernel(p_e, p_f, p_h, R, C, stride, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    tiles_c = tl.cdiv(C, BLOCK_C)
    i_r, i_c = (tl.program_id(0) // tiles_c).to(tl.int64), (tl.program_id(0) % tiles_c).to(tl.int64)
    o_r, o_c = i_r * BLOCK_R + tl.arange(0, BLOCK_R), i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_r, m_c = o_r < R, o_c < C
    p_be = p_e + o_r[:, None] * stride + o_c[None, :]
    b_e = tl.load(p_be, mask=m_r[:, None] & m_c[None, :], other=0.0).to(ACC)
    b_f, b_h = tl.load(p_f + o_r, mask=m_r, other=0.0), tl.load(p_h + o_c, mask=m_c, other=0.0)
    tl.store(p_be, _narrow(b_e * (b_f[:, None] + b_h[None, :]), p_e.dtype.element_ty), mask=m_r[:, None] & m_c[None, :])


@on_its_device
def combine(e: torch.Tensor, f: torch.Tensor, h: torch.Tensor) -> None:
    """e_ij *= f_i + h_j in place; e (R, C), f (R,), h (C,) of the accumulator's type."""
    (rows, columns), tile = e.shape, configs.CHUNK_WRITE
    grid = cdiv(rows, tile.block_r) * cdiv(columns, tile.block_c)
    _combine_kernel[(grid,)](
        e,
        f,
        h,
        rows,
        columns,
        e.stride(0),
        ACC=TRITON_DTYPE[accumulator(e.dtype)],
        BLOCK_R=tile.block_r,
        BLOCK_C=tile.block_c,
        **tile.options,
    )
    launch_log.note("combine", grid, 0, launch_log.size(e), launch_log.size(e))


def obstacle(problem) -> str:
    """Why the two directions cannot share a panel, or "": then row i of the one is column i of the other, dropped pairs included."""
    if problem.query.rows != problem.target.rows:
        return f"{problem.query.rows} queries and {problem.target.rows} targets: columns are not the other direction's rows"
    return problem.options.obstacle("shared_logits")


def largest_logit(problem) -> float:
    """A bound on |cos| / temperature, hardness included; infinity where knowing it would make the host wait for the device unasked."""
    o = problem.options
    scale = problem.inverse_temperature + (o.hardness if o.hardness_scope in ("all", "in_batch") else 0.0)
    if problem.query.inverse_norm is not None and not isinstance(scale, torch.Tensor):
        return scale * ROUNDING
    if problem.device.type == "cuda" and not o.validate:
        return float("inf")
    top = 1.0
    if problem.query.inverse_norm is None:
        top = norms(problem.query.source, problem.dtype).max() * norms(problem.target.source, problem.dtype).max()
    return float(scale * top) * ROUNDING


def decide(problem, gradients, workspace: int) -> dispatch.Plan | None:
    """The plan that prices one panel against two directions, or None where one panel cannot be had."""
    if obstacle(problem):
        return None
    source, wants = problem.query.source, (lambda name: False) if gradients is None else gradients.wants
    plan = dispatch.plan(
        problem.query.rows,
        problem.target.rows,
        problem.query.width,
        problem.product_dtype,
        workspace=workspace,
        symmetric=True,
        gpu=configs.gpu(source.device),
        normalize=problem.query.inverse_norm is not None,
        interpreted=INTERPRET,
        d_query=wants("query") or wants("temperature"),
        d_target=wants("target"),
    )
    return plan


def sweep(problem, directions, hard, gradients, workspace: int, want_best: bool):
    """(RowResult, RowSums) of both directions, whose gradients are added; None where they cannot share a panel, or two are cheaper."""
    plan = decide(problem, gradients, workspace)
    if plan is None or plan.path != "joint":
        return None
    bound = largest_logit(problem)
    return joint(problem, directions, hard, gradients, bound, want_best) if bound <= LARGEST_LOGIT else None


def joint(problem, parts, hard, gradients, bound: float, want_best: bool):
    """((RowResult, RowSums) of the forward direction, the same of the reverse); gradients of both are added.

    bound: on every |logit|, at most LARGEST_LOGIT.
    """
    forward, reverse = parts
    operand_views = OperandViews(forward, problem.product_dtype)
    block, view, acc = forward.blocks[0], operand_views.views[0], problem.dtype
    everyone, rows = slice(0, problem.query.rows), problem.query.rows
    shift = torch.full((rows,), bound - SHIFT_BELOW_TOP, dtype=acc, device=problem.device)
    panel = exp_panel(
        view.x, view.y, scale=view.scale, shift=shift, row_max=want_best, col_sum=True, store=gradients is not None, **view.options()
    )
    inverse_temperature = scalar(problem.inverse_temperature, acc, problem.device)
    states = [RowState.unfilled(rows, acc, problem.device, 0.0) for _ in parts]
    if hard is not None:
        states[0].load(hard.sums)
    row_parts = Parts(panel.row_part[0, 0], shift, panel.row_part[1, 0] if want_best else None)
    finish(states[0], everyone, row_parts, forward, inverse_temperature, prior=hard is not None)
    finish(states[1], everyone, Parts(panel.col_part[0], shift), reverse, inverse_temperature, prior=False)
    if gradients is not None:
        writer = GradientWriter(problem, forward, gradients, operand_views)
        positive = states[0].positive + states[1].positive
        e = panel.e[0]
        combine(e, *(state.factor for state in states))
        if writer.wants_anchors(block):
            writer.anchors(block, everyone, matmul(e, operand_views(block.columns.operand).unit, acc), None, positive)
        if gradients.wants(block.columns.sink):
            writer.columns(block, everyone, e, None, positive)
        writer.positives(positive)
    return tuple((state.result(), state.sums) for state in states)
