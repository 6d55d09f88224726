"""Small losses by torch's own operations: every logit and probability in memory, value and gradients in eleven launches.

    S = X Y^T / T     L = log softmax(S)     loss_i = -w L_i,positive     G = w (exp(L) - [j = positive]) / T     dX = G Y     dY = G^T X

A kernel of ours takes the host longer to launch than an operation of torch, and below some thousand rows the host is what a loss takes.
At the positive G holds expm1(L), where a difference of the probability and 1 would cancel. Bytes an element: 4 written, three times
read and written, 2 read twice; 10 of scratch.
"""

from __future__ import annotations

import torch

from contrastive_kernels.softmax import RowResult
from contrastive_kernels.triton.products import matmul
from contrastive_kernels.triton.sides import stored


def plain(problem, direction, gradients) -> bool:
    """Whether a direction has nothing that this file does not know."""
    o = problem.options
    refused = (o.symmetric, o.query_negatives, o.target_negatives, o.label_smoothing, o.return_stats, o.hardness, o.normalize)
    unknown = (o.group, o.hard_negatives, direction.active, direction.threshold, problem.kept_rows, o.query_mask, o.target_mask, o.matryoshka_dims)
    return (
        gradients is not None
        and gradients.wanted == {"query", "target"}
        and not any(refused)
        and all(x is None for x in unknown)
        and not any(block.ids for block in direction.blocks)
        and not isinstance(problem.inverse_temperature, torch.Tensor)
        and problem.product_dtype != torch.float16  # whose exponents end above w p / T
    )


def sweep(problem, direction, gradients) -> RowResult:
    """Every row of a `plain` direction; its gradients become those of `gradients`."""
    query, target = (stored(operand, problem.product_dtype) for operand in (problem.query, problem.target))
    scores = torch.log_softmax(matmul(query, target.T, problem.dtype).mul_(problem.inverse_temperature), 1)
    positives = problem.positives[:, None]
    positive = scores.gather(1, positives)
    weighted = (positive[:, 0] * direction.weight).neg_()
    scores.exp_().scatter_(1, positives, positive.expm1())
    slopes = torch.empty(scores.shape, dtype=problem.product_dtype, device=scores.device)
    torch.mul(scores, (direction.weight * problem.inverse_temperature)[:, None], out=slopes)
    gradients.held["query"] = matmul(slopes, target, problem.dtype)
    gradients.held["target"] = matmul(slopes.T, query, problem.dtype)
    return RowResult(None, None, None, None, None, weighted)
