"""Tiles of the sigmoid loss in plain torch. Legend: n rows; C columns of a tile; D width. Scratch of a few tiles, never N x M."""

from __future__ import annotations

import dataclasses

import torch

from ..core.operands import Operand
from .gemm import add_product, packed, product_into, transposed

TILE_ROWS, TILE_COLUMNS = 2048, 1024


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
