"""The k best targets of every query, streamed: scores of a tile live in registers and nothing of size N x M is ever stored.

Each program walks a split of the targets, in order, for BLOCK_R queries and keeps their K best. Up to `configs.TOPK_RESIDENT` wide the
queries' tile is read once and stays on the chip, so that a target's tile is fetched for BLOCK_R queries: 2 BLOCK_R FLOP an element.
From every tile the rows' greatest scores are taken out one at a time, as long as one of them beats its row's worst kept: K ln(M/K) times
a row, in the first few thousand targets for many rows at once. (Sorting tiles in registers, as tl.topk does, spills and takes longer.)
Targets to leave out are looked up only for those that would enter. A later target never replaces an equal score, so ties keep the
lowest index. FLOPs 2 N M D. Bytes: queries and targets once, 8 N K a split.
"""

import torch
import triton
import triton.language as tl

from ...core.operands import product_dtype
from .. import configs, launch_log
from .common import TRITON_DTYPE, _dot, accumulator, cdiv, check_columns, check_dtype, dot_precision, on_its_device, whole_blocks

MAXIMUM_K = 128


@triton.jit
def _topk_kernel(
    p_x,
    p_y,
    p_exclude,
    p_scores,
    p_indices,
    R,
    C,
    D,
    stride_x,
    stride_y,
    excluded,
    columns_per_split,
    K: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """RESIDENT: pieces of BLOCK_K that the whole width has, where they are kept; 0 where they are read again for every tile."""
    i_r = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1).to(tl.int64)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    o_k = tl.arange(0, BLOCK_K)
    o_slot = tl.arange(0, K)
    p_bx = p_x + tl.where(m_r, o_r, 0)[:, None] * stride_x + o_k[None, :]
    first = i_split * columns_per_split
    last = tl.minimum(first + columns_per_split, C)
    b_best = tl.full((BLOCK_R, K), float("-inf"), ACC)
    # empty slots bear indices that no target has, all different, so that the slot to replace is always one
    b_index = tl.zeros((BLOCK_R, K), tl.int32) + (0x7FFFFFFF - o_slot)[None, :]
    b_worst = tl.full((BLOCK_R,), float("-inf"), ACC)
    b_queries = ()
    for i in tl.static_range(RESIDENT):
        b_queries += (tl.load(p_bx + i * BLOCK_K),)
    for start in range(first, last, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        p_by = p_y + tl.where(o_c < last, o_c, 0)[:, None] * stride_y + o_k[None, :]
        b_acc = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        if RESIDENT:
            for i in tl.static_range(RESIDENT):
                b_acc = _dot(b_queries[i], tl.trans(tl.load(p_by + i * BLOCK_K)), b_acc, PRECISION)
        else:
            for k in range(0, D, BLOCK_K):
                b_acc = _dot(tl.load(p_bx + k), tl.trans(tl.load(p_by + k)), b_acc, PRECISION)
        o_col = o_c.to(tl.int32)
        if start + BLOCK_C > last:
            b_acc = tl.where((o_c < last)[None, :], b_acc, float("-inf"))
        b_top = tl.max(b_acc, 1)
        better = tl.max((b_top > b_worst).to(tl.int32), 0)
        if better > 0:  # the compiler fetches ahead only in loops that hold no other loop; one inside a condition it does not count
            while better > 0:
                b_col = tl.min(tl.where(b_acc == b_top[:, None], o_col[None, :], 0x7FFFFFFF), 1)
                b_enters = b_top > b_worst
                if p_exclude is not None:
                    for e in range(0, excluded):
                        b_enters = b_enters & (tl.load(p_exclude + o_r * excluded + e, mask=m_r, other=-1).to(tl.int32) != b_col)
                # of equal worst scores the highest index goes
                b_slot = tl.max(tl.where(b_best == b_worst[:, None], b_index, -1), 1)
                b_replace = (b_index == b_slot[:, None]) & b_enters[:, None]
                b_best = tl.where(b_replace, b_top[:, None], b_best)
                b_index = tl.where(b_replace, b_col[:, None], b_index)
                b_worst = tl.min(b_best, 1)
                b_acc = tl.where(o_col[None, :] == b_col[:, None], float("-inf"), b_acc)
                b_top = tl.max(b_acc, 1)
                better = tl.max((b_top > b_worst).to(tl.int32), 0)
    o_out = (i_split * R + o_r)[:, None] * K + o_slot[None, :]
    tl.store(p_scores + o_out, b_best, mask=m_r[:, None])
    tl.store(p_indices + o_out, b_index, mask=m_r[:, None])


@on_its_device
def topk(query, target, k: int, *, exclude=None, tile=None, splits=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (N, k) float32 (float64 for float64), descending, and indices (N, k) int64 of the greatest query . target.

    Args:
        query, target: (N, D), (M, D), M below 2^31 - 128; of two dtypes, both are taken in the wider. k: 1 to 128.
        exclude: (N, E) int64 targets a query must not get; -1 pads. Where too few are left: -inf and -1.
        tile, splits: a `configs.Tile` and the number of pieces the targets are cut into, instead of the defaults.

    Raises: ValueError for a dtype, k or M that the kernel does not take. Numerics: sums in the scores' type; of equal scores the
    lowest index comes first; a NaN score is never among the best.
    """
    dtype = product_dtype(query, target)
    check_dtype("topk_similarity", dtype)
    check_columns("target", len(target))
    if not 1 <= k <= MAXIMUM_K:
        raise ValueError(f"k: expected 1 to {MAXIMUM_K} for the Triton kernel, got {k}; use backend='torch'")
    query, target = query.to(dtype), target.to(dtype)
    rows, columns, acc, device = len(query), len(target), accumulator(dtype), query.device
    if not rows or not columns:
        return torch.full((rows, k), float("-inf"), dtype=acc, device=device), torch.full((rows, k), -1, device=device)
    kept = max(2, triton.next_power_of_2(k))
    tile = tile or configs.topk(configs.architecture(device), query.element_size(), kept, query.shape[1])
    x, y = whole_blocks(query, tile.block_k), whole_blocks(target, tile.block_k)
    tiles_r, tiles_c = cdiv(rows, tile.block_r), cdiv(columns, tile.block_c)
    # of tiles whose queries stay two blocks fit on a multiprocessor, of the others about four
    slots = configs.processors(device) * (2 if tile.resident else 4)
    splits = min(tiles_c, splits or configs.topk_splits(slots, tiles_r, tiles_c))
    per_split = cdiv(tiles_c, splits) * tile.block_c
    splits = cdiv(columns, per_split)
    scores = torch.empty(splits, rows, kept, dtype=acc, device=device)
    indices = torch.empty(splits, rows, kept, dtype=torch.int32, device=device)
    excluded = 0 if exclude is None else exclude.shape[1]
    _topk_kernel[(tiles_r, splits)](
        x,
        y,
        exclude.contiguous() if excluded else None,
        scores,
        indices,
        rows,
        columns,
        x.shape[1],
        x.stride(0),
        y.stride(0),
        excluded,
        per_split,
        K=kept,
        RESIDENT=x.shape[1] // tile.block_k if tile.resident else 0,
        ACC=TRITON_DTYPE[acc],
        PRECISION=dot_precision(x.dtype),
        **tile.constants,
        **tile.options,
    )
    launch_log.note(
        "topk",
        tiles_r * splits,
        2 * tiles_r * tile.block_r * tiles_c * tile.block_c * x.shape[1],
        launch_log.size(x, y),
        launch_log.size(scores, indices),
    )
    return _merge(scores, indices, k)


def _merge(scores, indices, k):
    """The k best of all splits, (S, N, K) each: by index first, then by score with a sort that keeps the order of equals."""
    rows = scores.shape[1]
    scores = scores.transpose(0, 1).reshape(rows, -1)
    indices, order = indices.transpose(0, 1).reshape(rows, -1).to(torch.int64).sort(dim=1)
    scores, best = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    scores, indices = scores[:, :k], indices.gather(1, best)[:, :k]
    missing = k - scores.shape[1]
    if missing > 0:
        scores = torch.nn.functional.pad(scores, (0, missing), value=float("-inf"))
        indices = torch.nn.functional.pad(indices, (0, missing), value=-1)
    return scores.contiguous(), indices.masked_fill(scores == float("-inf"), -1)
