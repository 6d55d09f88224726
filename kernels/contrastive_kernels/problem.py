"""From tensors and options to rows, blocks of candidates, and weights: what every compute path starts from.

The loss is a set of softmaxes. One `Direction` is one softmax a row: its anchors, its positives' cosines, its weights,
and `Block`s of candidates that share one denominator. `symmetric` is two directions. Legend: n rows of this rank,
N queries and M targets of all ranks (the same where no group is given), D width.
"""

from __future__ import annotations

import dataclasses

import torch

from contrastive_kernels.operands import Operand, compute_dtype, inverse_norms, norms
from contrastive_kernels.options import InfoNCEOptions

EPS = 1e-12


@dataclasses.dataclass
class Block:
    """Candidates shared by all rows: logits = (scale) * anchors @ candidates^T, some of them dropped.

    Args:
        anchors, candidates: operands (n, D) and (C, D); `anchor_sink`, `candidate_sink` name where gradients go.
        scale: what multiplies a cosine in the logit, 1 / temperature plus hardness.
        exclude: (n,) int64, the column that is the row itself or its positive.
        ids: pairs ((n,), (C,)) of int64; equal, non-negative-one pairs are dropped.
        keep: (C,) bool or None, columns that are candidates at all.
        offset: number of this block's first column as `exclude` counts them, for the shards of a ring; None when the
            block holds every column.
    """

    anchors: Operand
    candidates: Operand
    anchor_sink: str
    candidate_sink: str
    scale: float | torch.Tensor
    exclude: torch.Tensor
    ids: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    keep: torch.Tensor | None = None
    offset: int | None = None

    @property
    def columns(self) -> int:
        return self.candidates.rows


@dataclasses.dataclass
class Direction:
    """One softmax a row. `share` is its part of the loss (0.5 each when symmetric); `weight` (n,) is 0 for rows left out."""

    blocks: list[Block]
    positive: torch.Tensor  # (n,) cosine of each row's positive
    weight: torch.Tensor  # (n,) weights as they multiply row losses, share and mean's denominator included
    threshold: torch.Tensor | None  # (n,) cosine above which a negative is dropped
    active: torch.Tensor | None  # (n,) bool: rows that see the blocks at all (not own_negatives_only)
    with_hard: bool


@dataclasses.dataclass
class Problem:
    options: InfoNCEOptions
    dtype: torch.dtype
    inverse_temperature: float | torch.Tensor
    query: Operand  # (n, D)
    all_queries: Operand  # (N, D)
    target: Operand  # (M, D)
    positives: torch.Tensor  # (n,) int64, in range even for rows left out
    kept: torch.Tensor  # (n,) bool, rows that count
    share: torch.Tensor  # (n,) row weights, normalised by the mean's denominator, 0 where not kept
    directions: list[Direction]
    local: bool  # all_queries is query

    @property
    def device(self) -> torch.device:
        return self.query.source.device

    def largest_product(self) -> float:
        """The greatest |cos| that Cauchy and Schwarz allow; reads both matrices and waits for the device."""
        sides = [self.all_queries, self.target]
        return max(norms(side.source, side.dtype, side.keep).max().item() for side in sides) ** 2



@dataclasses.dataclass
class Shard:
    """The columns that a rank's rows see, gathered from all ranks, and where its own rows begin among them.

    `total_weight` sums a (n,) weight over ranks.
    """

    query: torch.Tensor
    target: torch.Tensor
    query_ids: torch.Tensor | None
    target_ids: torch.Tensor | None
    query_mask: torch.Tensor | None
    target_mask: torch.Tensor | None
    row_positives: torch.Tensor | None  # (N,) positives of all rows, in global numbering, -1 for rows left out
    first_row: int = 0
    first_target: int = 0
    total_weight: object = None


def default_positives(rows: int, targets: int, device) -> torch.Tensor:
    """Each positive followed by its own negatives, VLM2Vec's layout: i * (M // N)."""
    return torch.arange(rows, device=device) * (targets // rows)


def row_positives(rows, targets, options: InfoNCEOptions, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) positives made safe to index with, and (n,) bool of rows that have one and are not masked themselves."""
    if options.positives is None:
        positives = default_positives(rows, targets, device)
        kept = torch.ones(rows, dtype=torch.bool, device=device)
    else:
        kept = options.positives != options.ignore_index
        positives = torch.where(kept, options.positives, 0)
    if options.query_mask is not None:
        kept = kept & options.query_mask
    if options.target_mask is not None:
        kept = kept & options.target_mask[positives]
    return positives, kept


def owned_targets(positives: torch.Tensor, options: InfoNCEOptions) -> torch.Tensor:
    """(n,) the target that each query belongs to, -1 where it has none; a masked row still belongs to its own."""
    if options.positives is None:
        return positives
    return torch.where(options.positives == options.ignore_index, -1, positives)


def build(query: torch.Tensor, target: torch.Tensor, options: InfoNCEOptions, shard: Shard | None = None) -> Problem:
    """Prepare the softmaxes of this rank's rows. `query` (n, D), `target` (m, D) are the rank's own."""
    device, n = query.device, len(query)
    dtype = compute_dtype(query, target)
    local = shard is None
    positives, kept = row_positives(n, len(target), options, device)
    if shard is None:
        owners = owned_targets(positives, options) if options.symmetric else None
        shard = Shard(
            query, target, options.query_ids, options.target_ids, options.query_mask, options.target_mask, owners
        )
    else:
        positives = positives + shard.first_target

    def operand(matrix, mask):
        inverse = inverse_norms(matrix, dtype, EPS, mask) if options.normalize else None
        return Operand(matrix, dtype, inverse, mask)

    all_queries, targets = operand(shard.query, shard.query_mask), operand(shard.target, shard.target_mask)
    own = all_queries if local else operand(query, options.query_mask)

    inverse_temperature = _inverse_temperature(options.temperature, device, dtype)
    share = torch.where(kept, torch.ones_like(kept, dtype=dtype) if options.weight is None else options.weight.to(dtype), 0)
    if options.reduction == "mean":
        total = share.sum() if shard.total_weight is None else shard.total_weight(share)
        share = share / torch.where(total == 0, torch.ones_like(total), total)
    problem = Problem(
        options, dtype, inverse_temperature, own, all_queries, targets, positives, kept, share, [], local
    )
    problem.directions = _directions(problem, shard)
    return problem


def _inverse_temperature(temperature, device, dtype) -> float | torch.Tensor:
    """A float wherever that needs no wait for a GPU, so that it can ride on the GEMM's alpha."""
    if isinstance(temperature, torch.Tensor):
        if temperature.device.type == "cpu":
            value = temperature.item()
            if not 0 < value:
                raise ValueError(f"temperature: expected a number above 0, got {value}; 0.02 is usual")
            return 1.0 / value
        return temperature.detach().to(device=device, dtype=dtype).reciprocal()
    return 1.0 / float(temperature)


def row_dots(a: Operand, b: Operand) -> torch.Tensor:
    """(n,) dot products of matching rows."""
    out = torch.empty(a.rows, dtype=a.dtype, device=a.source.device)
    step = max(1, (4 << 20) // max(1, a.width))
    for start in range(0, a.rows, step):
        stop = min(start + step, a.rows)
        out[start:stop] = (a.tile(start, stop) * b.tile(start, stop)).sum(1)
    return out


def _threshold(options: InfoNCEOptions, positive: torch.Tensor) -> torch.Tensor | None:
    bounds = []
    if options.mask_margin is not None:
        bounds.append(positive + options.mask_margin)
    if options.mask_relative is not None:
        bounds.append(positive + options.mask_relative * positive.abs())
    if not bounds:
        return None
    return bounds[0] if len(bounds) == 1 else torch.minimum(*bounds)


def _matchable(ids: torch.Tensor) -> torch.Tensor:
    """Row ids with -1 turned into a value that no column bears."""
    return torch.where(ids == -1, torch.iinfo(torch.int64).min, ids)


def _directions(problem: Problem, shard: Shard) -> list[Direction]:
    options, positives = problem.options, problem.positives
    n, device = problem.query.rows, problem.device
    positive_rows = problem.target.gathered(positives)
    positive = row_dots(problem.query, positive_rows)
    threshold = _threshold(options, positive)
    active = None if options.own_negatives_only is None else ~options.own_negatives_only
    plain = problem.inverse_temperature
    batch_scale = plain + options.hardness if options.hardness_scope in ("all", "in_batch") else plain
    myself = torch.arange(shard.first_row, shard.first_row + n, device=device)
    query_ids = () if options.query_ids is None else ((_matchable(options.query_ids), shard.query_ids),)
    target_ids = ()
    if shard.target_ids is not None:
        target_ids = ((_matchable(shard.target_ids[positives]), shard.target_ids),)

    queries = "query" if problem.local else "all_queries"
    shared = dict(scale=batch_scale)
    blocks = [
        Block(problem.query, problem.target, "query", "target", exclude=positives, ids=target_ids, keep=shard.target_mask, **shared)
    ]
    if options.query_negatives:
        blocks.append(
            Block(problem.query, problem.all_queries, "query", queries, exclude=myself, ids=query_ids, keep=shard.query_mask, **shared)
        )
    if options.target_negatives:
        blocks.append(
            Block(positive_rows, problem.target, "positive", "target", exclude=positives, ids=target_ids, keep=shard.target_mask, **shared)
        )
    half = 0.5 if options.symmetric else 1.0
    directions = [Direction(blocks, positive, problem.share * half, threshold, active, with_hard=True)]
    if options.symmetric:
        owners = shard.row_positives
        ids = query_ids + _owner_ids(options, shard, positives, owners)
        reverse = Block(positive_rows, problem.all_queries, "positive", queries, exclude=myself, ids=ids, keep=shard.query_mask, **shared)
        directions.append(Direction([reverse], positive, problem.share * half, threshold, active, with_hard=False))
    return directions


def _owner_ids(options, shard, positives, owners):
    """Queries that share the row's positive, or a target with the same id, are no negatives of the reverse direction."""
    if shard.target_ids is None and options.positives is None:
        return ()  # every query has a target of its own
    by_position = torch.iinfo(torch.int64).min + 1
    if shard.target_ids is None:
        return ((positives, owners),)
    of_target = torch.where(shard.target_ids == -1, by_position + torch.arange(len(shard.target_ids), device=positives.device), shard.target_ids)
    return ((of_target[positives], torch.where(owners >= 0, of_target[owners.clamp(min=0)], -1)),)
