"""The k best targets of every query, streamed: never N x M."""

from __future__ import annotations

import math

import torch

from contrastive_kernels.backends import choose
from contrastive_kernels.operands import Operand, compute_dtype
from contrastive_kernels.panels import MIB, logits_into


def best_columns(values, k: int):
    """The k greatest of each row, equal ones by column: `values.sort(dim=1, descending=True, stable=True)[:, :k]` without sorting rows.

    The k best entries lie in the k blocks of columns with the greatest maxima, equal blocks taken in order: each such block
    holds an entry that is better than any outside, by value or by column. So one pass takes block maxima, and only
    k * block entries a row are sorted; a sort of the whole row costs 20 to 50 times the product's own pass.

    Args:
        values: (R, C). k: at least 1.

    Returns:
        (R, min(k, C)) values and int64 columns.
    """
    width = values.shape[1]
    block = 1 << max(3, round(math.log2(max(1.0, width / k)) / 2))
    blocks = width // block
    if blocks <= 2 * k:
        best = values.sort(dim=1, descending=True, stable=True)
        return best.values[:, :k], best.indices[:, :k]
    peaks = values[:, : blocks * block].unflatten(1, (blocks, block)).amax(-1)
    chosen = peaks.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    columns = (chosen[:, :, None] * block + torch.arange(block, device=values.device)).flatten(1)
    tail = torch.arange(blocks * block, width, device=values.device).expand(len(values), -1)
    columns = torch.cat([columns, tail], 1)
    picked = values.gather(1, columns)
    best = picked.sort(dim=1, descending=True, stable=True)
    order = best.indices[:, :k]
    return best.values[:, :k], columns.gather(1, order)


def topk_similarity(query, target, k: int, *, exclude=None, workspace_mib: float | None = None, backend: str = "auto"):
    """Scores and indices of each query's k greatest dot products with the targets.

    Args:
        query: (N, D). target: (M, D), same dtype and device.
        k: at least 1; where fewer than k targets are left, scores end in -inf and indices in -1.
        exclude: (N, E) int64 targets that a query must not get; -1 pads.
        workspace_mib: bound on scratch memory, default 256.

    Returns:
        scores (N, k) float32 (float64 for float64 input), descending, and indices (N, k) int64; of equal scores the
        lowest index comes first.
    """
    if query.dim() != 2 or target.dim() != 2 or query.shape[1] != target.shape[1]:
        raise ValueError(f"expected query (N, D) and target (M, D), got {tuple(query.shape)} and {tuple(target.shape)}")
    if k < 1:
        raise ValueError(f"k: expected 1 or more, got {k}")
    if choose(backend, query.dtype, query.device) == "triton":
        from contrastive_kernels.triton.topk import MAXIMUM_K, topk

        if k <= MAXIMUM_K:
            return topk(query.detach(), target.detach(), k, exclude=exclude)
        if backend == "triton":
            raise ValueError(f"backend='triton' cannot be had with k={k}: the kernel keeps at most {MAXIMUM_K}; use backend='auto' or 'torch'")
    dtype, device = compute_dtype(query, target), query.device
    n, m = len(query), len(target)
    rows = min(n, 1024)
    columns = max(k, min(m, int((workspace_mib or 256) * MIB) // (4 * rows * dtype.itemsize)))
    scores = torch.full((n, k), float("-inf"), dtype=dtype, device=device)
    indices = torch.full((n, k), -1, dtype=torch.int64, device=device)
    queries, targets = Operand(query, dtype), Operand(target, dtype)
    with torch.no_grad(), torch.autocast(device_type=device.type, enabled=False):
        for a in range(0, n, rows):
            b = min(a + rows, n)
            tile = queries.tile(a, b)
            for c in range(0, m, columns):
                d = min(c + columns, m)
                product = torch.empty(b - a, d - c, dtype=dtype, device=device)
                logits_into(product, tile, Operand(target[c:d], dtype), 1.0)
                if exclude is not None:
                    column = exclude[a:b] - c
                    inside = (column >= 0) & (column < d - c)
                    row = torch.arange(b - a, device=device)[:, None].expand_as(column)
                    product[row[inside], column[inside]] = float("-inf")
                found, column = best_columns(product, k)
                values = torch.cat([scores[a:b], found], 1)
                where = torch.cat([indices[a:b], column + c], 1)
                order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
                scores[a:b], indices[a:b] = values.gather(1, order), where.gather(1, order)
    indices.masked_fill_(scores == float("-inf"), -1)
    return scores, indices
