"""The k best targets of every query, streamed: scores of a tile live in registers and nothing of size N x M is ever stored.

    key = order-preserving bits of the score << 32 | (2^32 - 1 - index)        so that the greatest key is the best, lowest index first

Each program walks a share of the targets for BLOCK_R queries and keeps their K best keys sorted. A tile in which no score beats any
row's k-th best is passed over: after the first few thousand targets that is nearly every tile, and the cost is the product's.
FLOPs 2 N M D. Bytes: queries and targets once, 8 N K per share of targets. Keys are unique, so the result is deterministic.
"""

import torch
import triton
import triton.language as tl

from contrastive_kernels.triton import configs, work
from contrastive_kernels.triton.common import INTERPRET, _dot, cdiv, check_dtype, dot_precision, whole_blocks


@triton.jit
def _topk_kernel(
    p_x, p_y, p_exclude, p_keys, R, C, D, stride_x, stride_y, excluded, columns_per_share,
    HAS_EXCLUDE: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    i_share = tl.program_id(1).to(tl.int64)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    o_k = tl.arange(0, BLOCK_K)
    p_bx = p_x + tl.where(m_r, o_r, 0)[:, None] * stride_x + o_k[None, :]
    first = i_share * columns_per_share
    last = tl.minimum(first + columns_per_share, C)
    # the lowest key there is: minus infinity at no index
    b_best = tl.full((BLOCK_R, K), -0x7FFFFFFFFFFFFFFF, tl.int64)
    for start in range(first, last, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        p_by = p_y + tl.where(o_c < last, o_c, 0)[:, None] * stride_y + o_k[None, :]
        b_acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for k in range(0, D, BLOCK_K):
            b_acc = _dot(tl.load(p_bx + k), tl.trans(tl.load(p_by + k)), b_acc, PRECISION, UPCAST)
        if HAS_EXCLUDE:
            for e in range(0, excluded):
                b_out = tl.load(p_exclude + o_r * excluded + e, mask=m_r, other=-1)
                b_acc = tl.where(b_out[:, None] == o_c[None, :], float("-inf"), b_acc)
        # + 0 turns -0 into +0: they are equal, and the lowest index is to win
        b_bits = (b_acc + 0.0).to(tl.int32, bitcast=True)
        # negative floats order backwards: flip all bits but the sign
        b_ordered = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
        b_dead = (b_acc == float("-inf")) | (o_c >= last)[None, :]
        b_key = (b_ordered.to(tl.int64) << 32) | (0xFFFFFFFF - o_c)[None, :]
        b_key = tl.where(b_dead, -0x7FFFFFFFFFFFFFFF, b_key)
        # the greatest key of each row against its k-th best so far
        b_worst = tl.min(b_best, 1)
        if tl.max((tl.max(b_key, 1) > b_worst).to(tl.int32), 0) > 0:
            b_new = tl.topk(b_key, K)
            # bitonic merge: best of both halves' sorted lists, one ascending and one descending
            b_best = tl.topk(tl.reshape(tl.join(b_best, b_new), (BLOCK_R, 2 * K)), K)
    o_out = tl.arange(0, K)
    p_out = p_keys + (i_share * R + o_r)[:, None] * K + o_out[None, :]
    tl.store(p_out, b_best, mask=m_r[:, None])


def topk(query, target, k: int, *, exclude=None, tile=None, shares=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (N, k) float32, descending, and indices (N, k) int64 of the greatest query . target; ties take the lowest index.

    Args:
        query, target: (N, D), (M, D), one dtype, M below 2^32. k: 1 to 128.
        exclude: (N, E) int64 targets a query must not get; -1 pads. Where too few are left: -inf and -1.
        tile, shares: a `configs.Tile` and the number of pieces the targets are cut into, instead of the defaults.

    Raises: ValueError for a dtype or k that the kernel does not take. Numerics: float32 sums; NaN scores have no defined place.
    """
    check_dtype("topk_similarity", query.dtype)
    if query.dtype == torch.float64:
        raise ValueError("topk_similarity: expected bfloat16, float16 or float32 for the Triton kernel, got float64; use backend='torch'")
    if not 1 <= k <= 128:
        raise ValueError(f"k: expected 1 to 128 for the Triton kernel, got {k}; use backend='torch'")
    rows, columns = len(query), len(target)
    if not rows or not columns:
        return query.new_full((rows, k), float("-inf"), dtype=torch.float32), torch.full((rows, k), -1, device=query.device)
    tile = tile or configs.topk(configs.architecture(query.device), query.element_size())
    x, y = whole_blocks(query, tile.block_k), whole_blocks(target, tile.block_k)
    kept = max(2, triton.next_power_of_2(k))
    tile_c = max(tile.block_c, kept)
    tiles_r, tiles_c = cdiv(rows, tile.block_r), cdiv(columns, tile_c)
    shares = min(tiles_c, shares or configs.topk_shares(query.device, tiles_r))
    per_share = cdiv(tiles_c, shares) * tile_c
    shares = cdiv(columns, per_share)
    keys = torch.empty(shares, rows, kept, dtype=torch.int64, device=query.device)
    excluded = 0 if exclude is None else exclude.shape[1]
    _topk_kernel[(tiles_r, shares)](
        x, y, keys if not excluded else exclude.contiguous(), keys, rows, columns, x.shape[1], x.stride(0), y.stride(0), excluded, per_share,
        HAS_EXCLUDE=excluded > 0, K=kept, PRECISION=dot_precision(x.dtype), UPCAST=INTERPRET,
        BLOCK_R=tile.block_r, BLOCK_C=tile_c, BLOCK_K=tile.block_k, **tile.options,
    )
    work.note("topk", tiles_r * shares, 2 * tiles_r * tile.block_r * tiles_c * tile_c * x.shape[1], work.size(x, y), work.size(keys))
    best = keys.transpose(0, 1).reshape(rows, -1).topk(min(k, shares * kept), dim=1).values
    if best.shape[1] < k:
        best = torch.nn.functional.pad(best, (0, k - best.shape[1]), value=-0x7FFFFFFFFFFFFFFF)
    none = best == -0x7FFFFFFFFFFFFFFF
    bits = (best >> 32).to(torch.int32)
    scores = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)
    return scores.masked_fill(none, float("-inf")), (0xFFFFFFFF - (best & 0xFFFFFFFF)).masked_fill(none, -1)
