"""The losses with the Triton kernels."""

from __future__ import annotations

from ..core import matryoshka as levels_of
from ..core.backend import Backend, log_once
from ..core.operands import product_dtype
from ..eager.backend import EAGER
from . import distillation, matryoshka, ring, sweep, symmetric
from .kernels import norms, sigmoid_panel
from .kernels.common import INTERPRET


class TritonBackend(Backend):
    """The kernels: on CUDA, or interpreted on a CPU with TRITON_INTERPRET=1."""

    name = "triton"
    strided_positives = False

    def inverse_norms(self, matrix, dtype, eps, keep):
        return norms.inverse_norms(matrix, dtype, eps, keep)

    def row_dots(self, a, b):
        return norms.operand_dots(a, b)

    def project_out(self, gradient, operand, eps):
        norms.project_out(gradient, operand, eps)

    def sweep_direction(self, problem, direction, hard, gradients, workspace, want_best):
        return sweep.sweep(problem, direction, hard, gradients, workspace, want_best)

    def sweep_symmetric(self, problem, directions, hard, gradients, workspace, want_best):
        return symmetric.sweep(problem, directions, hard, gradients, workspace, want_best)

    def sum_shard(self, problem, direction, workspace, sums, want_best):
        ring.sum_shard(problem, direction, workspace, sums, want_best)

    def differentiate_shard(self, problem, direction, workspace, sums, result, logit, gradients):
        ring.differentiate_shard(problem, direction, workspace, sums, result, logit, gradients)

    def matryoshka(self, query, target, options, levels, wanted, workspace):
        plan = matryoshka.plan(query, target, options, workspace)
        if plan.path != "levels":
            return None
        computed = matryoshka.compute(query, target, levels, wanted, plan.rows, self)
        return levels_of.weighted_sum(query, target, options, computed)

    def distill(self, student, teacher, gradients, workspace):
        return distillation.sweep(student, teacher, gradients, workspace)

    def add_sigmoid_columns(self, pairs, target, target_ids, offset, sums, d_target):
        dtype = product_dtype(pairs.query.source, target.source)
        if dtype.itemsize > 2 and not INTERPRET:
            log_once(f"sigmoid_loss of {dtype}, which has no tensor cores here: the library's products are faster")
            EAGER.add_sigmoid_columns(pairs, target, target_ids, offset, sums, d_target)
        else:
            sigmoid_panel.add_columns(pairs, target, target_ids, offset, sums, d_target)


TRITON = TritonBackend()
