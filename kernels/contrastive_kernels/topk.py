"""The k best targets of every query, streamed: never N x M."""

from __future__ import annotations

import math

import torch

from .checks import check_matrices, check_tensor, may_look
from .core.autograd.namespace import NAMESPACE
from .core.backend import log_once
from .core.backends import choose
from .core.operands import Operand, compute_dtype, product_dtype
from .core.option_checks import check_switches, check_workspace
from .eager.gemm import product_into
from .eager.sweep import MIB

WORKSPACE_MIB = 256
CHECKED_ROWS = 65_536  # looked at together
PANEL_ROWS, PRODUCT_COLUMNS = 1024, 4096  # of a panel; of one product on a CPU, near the cache
CACHED_BYTES, COLUMNS_FOR_EACH = (
    16 << 20,
    400,
)  # of a tile on a CPU; below as many columns for each of the k, merging costs more than it saves


def stable_topk(values, k: int):
    """`values.sort(dim=1, descending=True, stable=True)` cut to k columns, without sorting rows.

    `torch.topk` leaves open which of equal entries it takes. Rows where the k-th value has equals outside are sorted after all.
    """
    if k >= values.shape[1] // 2:
        best = values.sort(dim=1, descending=True, stable=True)
        return best.values[:, :k], best.indices[:, :k]
    least, columns = values.topk(k, dim=1, sorted=False)
    tied = (values >= least.amin(1, keepdim=True)).sum(1) > k
    columns = columns.sort(dim=1).values
    found = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns, found = columns.gather(1, found.indices), found.values
    if bool(tied.any()):
        rows = tied.nonzero()[:, 0]
        best = values[rows].sort(dim=1, descending=True, stable=True)
        found[rows], columns[rows] = best.values[:, :k], best.indices[:, :k]
    return found, columns


class NotANumber(Exception):
    """A score that no order holds for."""


def _refuse_nan(greatest) -> None:
    """NaN is the greatest of every row that holds one, and greater than nothing: its whole tile would be passed over."""
    if bool(greatest.isnan().any()):
        raise NotANumber


def merge_tile(scores, indices, tile, first: int) -> None:
    """Merge a tile of new scores into the running best k of each row, in place; earlier columns win ties.

    The k best entries of a row lie in its k blocks of columns with the greatest maxima, equal blocks taken in order: each such
    block holds an entry that is better than any outside, by value or by column. So one pass over the tile takes block maxima;
    rows whose greatest one does not beat their k-th score are done, the others see k * block entries. Sorting whole rows costs
    20 to 50 times the product itself.

    Args:
        scores, indices: (R, k), descending, -inf and -1 where nothing was found yet. tile: (R, C) scores of the columns from
            `first` on.

    Raises: NotANumber for a tile that holds NaN.
    """
    k, width = scores.shape[1], tile.shape[1]
    block = 2 << max(2, round(math.log2(max(1.0, width / k)) / 2))
    blocks = width // block
    if blocks <= 2 * k:
        found, columns = stable_topk(tile, min(k, width))
        greatest = found[:, 0]
        _refuse_nan(greatest)
        rows = torch.arange(len(tile), device=tile.device)
    else:
        peaks = tile[:, : blocks * block].unflatten(1, (blocks, block)).amax(-1)
        tail = torch.arange(blocks * block, width, device=tile.device)
        greatest = peaks.amax(1)
        if len(tail):
            greatest = torch.maximum(greatest, tile[:, blocks * block :].amax(1))
        _refuse_nan(greatest)
        rows = (greatest > scores[:, -1]).nonzero()[:, 0]
        if not len(rows):
            return
        chosen = stable_topk(peaks[rows], k)[1].sort(dim=1).values
        columns = (chosen[:, :, None] * block + torch.arange(block, device=tile.device)).flatten(1)
        columns = torch.cat([columns, tail.expand(len(rows), -1)], 1)
        found, where = stable_topk(tile[rows[:, None], columns], k)
        columns = columns.gather(1, where)
    values = torch.cat([scores[rows], found], 1)
    places = torch.cat([indices[rows], columns + first], 1)
    best = values.sort(dim=1, descending=True, stable=True)
    scores[rows], indices[rows] = best.values[:, :k], places.gather(1, best.indices[:, :k])


def _stream(query, target, k: int, exclude, workspace: int):
    """`topk_similarity` in plain torch: panels of rows, tiles of columns within `workspace` bytes."""
    dtype, device = compute_dtype(query, target), query.device
    n, m = len(query), len(target)
    rows = max(1, min(n, PANEL_ROWS))
    columns = workspace // (rows * dtype.itemsize)
    if device.type == "cpu":  # a tile that is still in the cache when it is looked through: 1.26 of the bare product, 1.47 in 256 MiB
        columns = min(columns, max(CACHED_BYTES // (rows * dtype.itemsize), COLUMNS_FOR_EACH * k))
    columns = max(k, min(m, columns))
    scores = torch.full((n, k), float("-inf"), dtype=dtype, device=device)
    indices = torch.full((n, k), -1, dtype=torch.int64, device=device)
    buffer = torch.empty(rows * columns, dtype=dtype, device=device)
    queries, targets = Operand(query, dtype), Operand(target, dtype)
    for a in range(0, n, rows):
        b = min(a + rows, n)
        tile = queries.tile(a, b)
        for c in range(0, m, columns):
            d = min(c + columns, m)
            product = buffer[: (b - a) * (d - c)].view(b - a, d - c)
            step = d - c if product.is_cuda else PRODUCT_COLUMNS
            for e in range(c, d, step):
                f = min(e + step, d)
                product_into(product[:, e - c : f - c], tile, targets.tile(e, f), cut=False)
            if exclude is not None:
                column = exclude[a:b] - c
                inside = (column >= 0) & (column < d - c)
                row = torch.arange(b - a, device=device)[:, None].expand_as(column)
                product[row[inside], column[inside]] = float("-inf")
            merge_tile(scores[a:b], indices[a:b], product, c)
    indices.masked_fill_(scores == float("-inf"), -1)
    return scores, indices


def _check_finite(query, target) -> None:
    """Names the row that is to blame. A pass over both matrices, which a search for few queries would not be worth."""
    for name, matrix in (("query", query), ("target", target)):
        for start in range(0, len(matrix), CHECKED_ROWS):
            part = matrix[start : start + CHECKED_ROWS]
            if part.numel() and not all(bool(x.isfinite()) for x in torch.aminmax(part)):
                row = start + int((~part.isfinite()).any(1).nonzero()[0])
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in row {row}; leave such rows out")


def _check_exclude(exclude, target) -> None:
    if exclude is not None and exclude.numel():
        least, greatest = map(int, torch.aminmax(exclude))
        if least < -1 or greatest >= len(target):
            wrong = least if least < -1 else greatest
            raise ValueError(f"exclude: expected indices from 0 to {len(target) - 1} or -1, got {wrong}; -1 pads")


@torch.library.custom_op(f"{NAMESPACE}::topk_similarity", mutates_args=())
def _topk(
    query: torch.Tensor, target: torch.Tensor, k: int, exclude: torch.Tensor | None, workspace: int, backend: str, validate: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if may_look(query, validate):
        _check_exclude(exclude, target)
        if backend == "triton":  # whose kernel passes over NaN
            _check_finite(query, target)
    with torch.no_grad(), torch.autocast(device_type=query.device.type, enabled=False):
        if backend == "triton":
            from .triton.kernels.topk import topk

            return topk(query, target, k, exclude=exclude)
        try:
            return _stream(query, target, k, exclude, workspace)
        except NotANumber:
            _check_finite(query, target)
            raise ValueError("query and target: expected finite products, got NaN: infinities that cancel; scale them down") from None


@_topk.register_fake
def _(query, target, k, exclude, workspace, backend, validate):
    shape = query.shape[0], k
    return query.new_empty(shape, dtype=compute_dtype(query, target)), query.new_empty(shape, dtype=torch.int64)


def topk_similarity(
    query, target, k: int, *, exclude=None, workspace_mib: float | None = None, backend: str = "auto", validate: bool = False
):
    """Scores and indices of each query's k greatest dot products with the targets.

    Args:
        query: (N, D). target: (M, D), same dtype and device.
        k: at least 1; where fewer than k targets are left, scores end in -inf and indices in -1.
        exclude: (N, E) int64 targets that a query must not get; -1 pads.
        workspace_mib: bound on scratch memory, default 256.
        backend: "auto" (the kernels on CUDA, torch elsewhere), "torch" or "triton".
        validate: run the checks that would wait for a GPU: the range of `exclude`, and NaN where the kernels run (plain torch finds it
            anyway).

    Returns:
        scores (N, k) float32 (float64 for float64 input), descending, and indices (N, k) int64; of equal scores the
        lowest index comes first. Not differentiable.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.

    Example:
        >>> import torch
        >>> query, target = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.8, 0.6]])
        >>> scores, indices = topk_similarity(query, target, k=2)
        >>> indices
        tensor([[1, 2]])
        >>> topk_similarity(query, target, k=2, exclude=torch.tensor([[1]]))[1]
        tensor([[2, 0]])
    """
    check_matrices(query, target, empty=True)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k: expected 1 or more, got {k!r}; 1 finds the nearest alone")
    if exclude is not None:
        check_tensor("exclude", exclude, "({}, E)", query.shape[0])
        if exclude.dim() != 2 or exclude.shape[0] != query.shape[0] or exclude.dtype != torch.int64:
            raise ValueError(f"exclude: expected int64 of shape ({len(query)}, E), got {exclude.dtype} {tuple(exclude.shape)}; -1 pads")
        if exclude.device != query.device:
            raise ValueError(f"exclude: expected it on {query.device}, got {exclude.device}; move it there")
    check_workspace(workspace_mib)
    check_switches(validate=validate)
    chosen = choose(backend, product_dtype(query, target), query.device).name
    if chosen == "triton":
        from .triton.kernels.topk import MAXIMUM_K

        if k > MAXIMUM_K:
            if backend == "triton":
                raise ValueError(
                    f"backend='triton' and k: expected at most {MAXIMUM_K}, which the kernel keeps, got k={k}; "
                    "use backend='auto' or 'torch'"
                )
            log_once(f"topk_similarity with k={k}, and the kernel keeps at most {MAXIMUM_K}")
            chosen = "torch"
    return _topk(query.detach(), target.detach(), k, exclude, int((workspace_mib or WORKSPACE_MIB) * MIB), chosen, validate)
