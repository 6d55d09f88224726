"""The sigmoid loss (SigLIP, Zhai et al. 2023), streamed: every pair is judged on its own, so one pass over tiles makes all.

    loss = -sum over pairs of log sigmoid(z x),  x = scale q.t + bias,  z = +1 where query and target belong together, else -1

Legend: n, m rows and targets of this rank; C columns of a tile; D width. 6 n M D FLOP, scratch of a few tiles, never N x M.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from ..core.backends import sigmoid_columns_for
from ..core.distributed import _all_gather, _rotate
from ..core.operands import Operand, compute_dtype, product_dtype, project_out
from ..core.problem import EPS, default_positives, matchable, operand
from .gemm import add_product, packed, product_into, transposed

TILE_ROWS, TILE_COLUMNS = 2048, 1024
GRADIENTS = ("query", "target", "scale", "bias")


@dataclasses.dataclass
class Pairs:
    """This rank's rows and what tells a pair that belongs together.

    Args:
        query: (n, D). positives: (n,) global number of each row's target, -1 for none. ids: (n,) what columns are compared with,
            never -1, or None. weight: (n,) over the mean's denominator, 0 for rows left out.
    """

    query: Operand
    positives: torch.Tensor | None
    ids: torch.Tensor | None
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor


@dataclasses.dataclass
class Sums:
    """What is summed over the pairs; gradients that nobody wants are None."""

    loss: torch.Tensor  # (n,)
    d_query: torch.Tensor | None
    d_scale: torch.Tensor
    d_bias: torch.Tensor
    differentiate: bool


def add_columns(pairs: Pairs, target: Operand, target_ids, offset: int, sums: Sums, d_target) -> None:
    """Add every pair of this rank's rows with `target`'s columns, whose first has the global number `offset`."""
    with_kernels = sigmoid_columns_for(product_dtype(pairs.query.source, target.source), pairs.weight.device)
    if with_kernels is not None:
        return with_kernels(pairs, target, target_ids, offset, sums, d_target)
    device, rows = pairs.weight.device, pairs.query.rows
    for a in range(0, rows, TILE_ROWS):
        b = min(a + TILE_ROWS, rows)
        q = pairs.query.tile(a, b)
        columns = min(TILE_COLUMNS, target.rows)
        anchors, across = packed(q, columns), packed(q.T, columns) if d_target is not None else None
        pulled = torch.zeros_like(q.T, memory_format=torch.contiguous_format) if sums.d_query is not None else None
        for c in range(0, target.rows, TILE_COLUMNS):
            d = min(c + TILE_COLUMNS, target.rows)
            t = target.tile(c, d)
            cosine = q.new_empty(d - c, b - a)
            product_into(cosine, t, anchors)
            x = cosine.mul(pairs.scale).add_(pairs.bias)
            together = torch.zeros(d - c, b - a, dtype=torch.bool, device=device)
            if pairs.positives is not None:
                together |= torch.arange(offset + c, offset + d, device=device)[:, None] == pairs.positives[None, a:b]
            if pairs.ids is not None:
                together |= target_ids[c:d, None] == pairs.ids[None, a:b]
            signed = torch.where(together, -x, x)  # -z x
            gone = None if target.keep is None else ~target.keep[c:d, None]
            # softplus(-z x) without torch's cut above 20, which costs float64 half its digits
            pair = -torch.nn.functional.logsigmoid(-signed)
            if gone is not None:
                pair.masked_fill_(gone, 0)
            sums.loss[a:b] += pair.sum(0)
            if not sums.differentiate:
                continue
            # d pair / d x = -z sigmoid(-z x)
            slope = signed.sigmoid_()
            slope = torch.where(together, -slope, slope).mul_(pairs.weight[None, a:b])
            if gone is not None:
                slope.masked_fill_(gone, 0)
            sums.d_bias += slope.sum()
            sums.d_scale += torch.linalg.vecdot(slope, cosine).sum()
            slope.mul_(pairs.scale)
            if pulled is not None:
                add_product(pulled, transposed(t, b - a), slope.T)
            if d_target is not None:
                add_product(d_target[c:d], slope, across)
        if pulled is not None:
            sums.d_query[a:b] += pulled.T


def compute(query, target, scale, bias, positives, query_ids, target_ids, query_mask, target_mask, weight, settings, wanted):
    """Loss and the gradients whose index in GRADIENTS is in `wanted`; `settings` (normalize, ignore_index, reduction, group, exchange)."""
    normalize, ignore_index, reduction, group, exchange = settings
    with torch.no_grad(), torch.autocast(device_type=query.device.type, enabled=False):
        n, m, device, dtype = len(query), len(target), query.device, compute_dtype(query, target)
        rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        rows = torch.ones(n, dtype=torch.bool, device=device) if query_mask is None else query_mask
        if query_ids is not None:
            ids, own = matchable(query_ids), None
        else:
            positives = default_positives(n, m, device) if positives is None else positives
            there = positives != ignore_index
            rows, index = rows & there, torch.where(there, positives, 0)
            own = torch.where(there, index + rank * m, -1)
            ids = None if target_ids is None else matchable(torch.where(there, target_ids[index], -1))
        share = torch.where(rows, torch.ones(n, dtype=dtype, device=device) if weight is None else weight.to(dtype), 0)
        if reduction == "mean":
            total = share.sum()
            if group is not None:
                dist.all_reduce(total, group=group)
            share = share / torch.where(total == 0, 1, total)
        own_query = operand(query, dtype, normalize, query_mask)
        own_target = operand(target, dtype, normalize, target_mask)
        scale, bias = scale.to(device=device, dtype=dtype), bias.to(device=device, dtype=dtype)
        pairs = Pairs(own_query, own, ids, share, scale, bias)
        sums = Sums(
            torch.zeros(n, dtype=dtype, device=device),
            torch.zeros(n, query.shape[1], dtype=dtype, device=device) if 0 in wanted else None,
            scale.new_zeros(()),
            scale.new_zeros(()),
            bool(wanted),
        )
        d_target = torch.zeros(m, query.shape[1], dtype=dtype, device=device) if 1 in wanted else None
        if group is None:
            add_columns(pairs, own_target, target_ids, 0, sums, d_target)
        elif exchange == "gather":
            d_target = _gathered(pairs, own_target, target_ids, sums, d_target, group)
        else:
            d_target = _ring(pairs, own_target, target_ids, sums, d_target, group)
        loss = torch.where(share != 0, sums.loss * share, 0)
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


def _columns_of(own: Operand, fields) -> Operand:
    source, inverse, keep = fields
    return Operand(source, own.dtype, inverse, keep)


def _gathered(pairs, own: Operand, target_ids, sums, d_target, group):
    """Columns of all ranks come here; their gradients are summed and every rank keeps its own."""
    rank, m = dist.get_rank(group), own.rows
    whole = _columns_of(own, [_all_gather(x, group) for x in (own.source, own.inverse_norm, own.keep)])
    d_whole = None if d_target is None else d_target.new_zeros(whole.rows, own.width)
    add_columns(pairs, whole, _all_gather(target_ids, group), 0, sums, d_whole)
    if d_whole is None:
        return None
    dist.all_reduce(d_whole, group=group)
    return d_whole[rank * m : (rank + 1) * m].clone()


def _ring(pairs, own: Operand, target_ids, sums, d_target, group):
    """Columns travel with their gradients; after a whole turn both are home."""
    rank, world, m = dist.get_rank(group), dist.get_world_size(group), own.rows
    held = [own.source, own.inverse_norm, own.keep, target_ids, d_target]
    for step in range(world):
        add_columns(pairs, _columns_of(own, held[:3]), held[3], (rank - step) % world * m, sums, held[4])
        if step + 1 < world:
            held = _rotate(held, group)
        elif held[4] is not None:
            held[4] = _rotate(held[4:], group)[0]
    return held[4]
