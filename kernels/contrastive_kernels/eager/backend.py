"""The losses in plain torch."""

from __future__ import annotations

from ..core import operands
from ..core.backend import Backend
from . import distillation, matryoshka, ring, sigmoid, sweep, symmetric


class EagerBackend(Backend):
    """Plain torch: on a CPU, and wherever the kernels cannot run."""

    name = "torch"
    strided_positives = True

    def inverse_norms(self, matrix, dtype, eps, keep):
        return operands.inverse_norms(matrix, dtype, eps, keep)

    def row_dots(self, a, b):
        return operands.row_dots(a, b)

    def project_out(self, gradient, operand, eps):
        operands.project_out(gradient, operand, eps)

    def sweep_direction(self, problem, direction, hard, gradients, workspace, want_best):
        return sweep.sweep(problem, direction, hard, gradients, workspace, want_best)

    def sweep_symmetric(self, problem, directions, hard, gradients, workspace, want_best):
        if not symmetric.share_logits(problem, directions):
            return None
        return symmetric.sweep(problem, directions, hard, gradients, workspace, want_best)

    def sum_shard(self, problem, direction, workspace, sums, want_best):
        ring.sum_shard(problem, direction, workspace, sums, want_best)

    def differentiate_shard(self, problem, direction, workspace, sums, result, logit, gradients):
        ring.differentiate_shard(problem, direction, workspace, sums, result, logit, gradients)

    def matryoshka(self, query, target, options, levels, wanted, workspace):
        shared = matryoshka.shared_levels(query, target, options, levels, self)
        return None if shared is None else matryoshka.compute(query, target, shared, wanted, workspace)

    def distill(self, student, teacher, gradients, workspace):
        return distillation.sweep(student, teacher, gradients, workspace)

    def add_sigmoid_columns(self, pairs, target, target_ids, offset, sums, d_target):
        sigmoid.add_columns(pairs, target, target_ids, offset, sums, d_target)


EAGER = EagerBackend()
