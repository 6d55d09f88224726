"""The sigmoid loss (SigLIP, Zhai et al. 2023), streamed: every pair is judged on its own, so one pass over tiles makes all.

    loss = -sum over pairs of log sigmoid(z x),  x = scale q.t + bias,  z = +1 where query and target belong together, else -1

Legend: n, m rows and targets of this rank; C columns of a tile; D width. 6 n M D FLOP, scratch of a few tiles, never N x M.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..eager.backend import EAGER
from ..eager.sigmoid import Pairs, Sums
from .backend import Backend
from .backends import choose
from .distributed import _all_gather, _rotate
from .operands import Operand, compute_dtype, product_dtype, project_out
from .problem import EPS, default_positives, matchable, operand

GRADIENTS = ("query", "target", "scale", "bias")


def compute(query, target, scale, bias, positives, query_ids, target_ids, query_mask, target_mask, weight, settings, wanted):
    """Loss and the gradients whose index in GRADIENTS is in `wanted`; `settings` (normalize, ignore_index, reduction, group, exchange)."""
    normalize, ignore_index, reduction, group, exchange = settings
    with torch.no_grad(), torch.autocast(device_type=query.device.type, enabled=False):
        n, m, device, dtype = len(query), len(target), query.device, compute_dtype(query, target)
        rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        rows = torch.ones(n, dtype=torch.bool, device=device) if query_mask is None else query_mask
        if query_ids is not None:
            ids, columns = matchable(query_ids), None
        else:
            positives = default_positives(n, m, device) if positives is None else positives
            has_positive = positives != ignore_index
            rows, index = rows & has_positive, torch.where(has_positive, positives, 0)
            columns = torch.where(has_positive, index + rank * m, -1)
            ids = None if target_ids is None else matchable(torch.where(has_positive, target_ids[index], -1))
        row_weight = torch.where(rows, torch.ones(n, dtype=dtype, device=device) if weight is None else weight.to(dtype), 0)
        if reduction == "mean":
            total = row_weight.sum()
            if group is not None:
                dist.all_reduce(total, group=group)
            row_weight = row_weight / torch.where(total == 0, 1, total)
        own_query = operand(query, dtype, normalize, query_mask, EAGER)
        own_target = operand(target, dtype, normalize, target_mask, EAGER)
        scale, bias = scale.to(device=device, dtype=dtype), bias.to(device=device, dtype=dtype)
        backend = choose("auto", product_dtype(query, target), device)
        pairs = Pairs(own_query, columns, ids, row_weight, scale, bias)
        sums = Sums(
            torch.zeros(n, dtype=dtype, device=device),
            torch.zeros(n, query.shape[1], dtype=dtype, device=device) if 0 in wanted else None,
            scale.new_zeros(()),
            scale.new_zeros(()),
            bool(wanted),
        )
        d_target = torch.zeros(m, query.shape[1], dtype=dtype, device=device) if 1 in wanted else None
        if group is None:
            backend.add_sigmoid_columns(pairs, own_target, target_ids, 0, sums, d_target)
        elif exchange == "gather":
            d_target = _gathered(backend, pairs, own_target, target_ids, sums, d_target, group)
        else:
            d_target = _ring(backend, pairs, own_target, target_ids, sums, d_target, group)
        loss = torch.where(row_weight != 0, sums.loss * row_weight, 0)
        loss = loss if reduction == "none" else loss.sum()
        if group is not None:
            dist.all_reduce(loss, group=group)
        gradients = [sums.d_query, d_target, sums.d_scale, sums.d_bias]
        for gradient in gradients if world > 1 else ():
            if gradient is not None:
                gradient.mul_(world)
        for gradient, side in zip(gradients[:2], (own_query, own_target)):
            if gradient is not None:
                project_out(gradient, side, EPS)
        return loss, [g if i in wanted else None for i, g in enumerate(gradients)]


def _columns_of(local: Operand, fields) -> Operand:
    source, inverse, keep = fields
    return Operand(source, local.dtype, inverse, keep)


def _gathered(backend: Backend, pairs, local: Operand, target_ids, sums, d_target, group):
    """Columns of all ranks come here; their gradients are summed and every rank keeps its own."""
    rank, m = dist.get_rank(group), local.rows
    gathered = _columns_of(local, [_all_gather(x, group) for x in (local.source, local.inverse_norm, local.keep)])
    d_gathered = None if d_target is None else d_target.new_zeros(gathered.rows, local.width)
    backend.add_sigmoid_columns(pairs, gathered, _all_gather(target_ids, group), 0, sums, d_gathered)
    if d_gathered is None:
        return None
    dist.all_reduce(d_gathered, group=group)
    return d_gathered[rank * m : (rank + 1) * m].clone()


def _ring(backend: Backend, pairs, local: Operand, target_ids, sums, d_target, group):
    """Columns travel with their gradients; after a whole turn both are home."""
    rank, world, m = dist.get_rank(group), dist.get_world_size(group), local.rows
    travelling = [local.source, local.inverse_norm, local.keep, target_ids, d_target]
    for step in range(world):
        backend.add_sigmoid_columns(
            pairs, _columns_of(local, travelling[:3]), travelling[3], (rank - step) % world * m, sums, travelling[4]
        )
        if step + 1 < world:
            travelling = _rotate(travelling, group)
        elif travelling[4] is not None:
            travelling[4] = _rotate(travelling[4:], group)[0]
    return travelling[4]
