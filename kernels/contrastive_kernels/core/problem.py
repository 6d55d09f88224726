"""From tensors and options to rows, columns, blocks of candidates and weights: what every compute path starts from.

The loss is a set of softmaxes. One `Direction` is one softmax a row: `Block`s of candidates that share a denominator.
`symmetric` is two directions. Rows belong to this rank. Columns (`Columns`) may be this rank's, those of all ranks
(gather) or one rank's at a time (ring). Legend: n, m rows and targets of this rank; N, M columns; D width.

Where every row has a temperature of its own, T is the least of them, and row i's anchor, positive's cosine and threshold carry the
factor T / temperature_i (`row_scale`, at most 1): "cosine" means that product then, and all rows share 1 / T.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from ..options import InfoNCEOptions
from .operands import Operand, RowOperations, compute_dtype, norms, product_dtype

EPS = 1e-12
UNMATCHABLE = torch.iinfo(torch.int64).min


@dataclasses.dataclass
class Columns:
    """One side's embeddings as candidates, with what is known of each.

    Args:
        operand: (C, D). sink: name that its gradient is kept under.
        ids: (C,) int64 or None. keep: (C,) bool or None, False where it is no candidate.
        owners: (C,) int64 or None, for queries the identity of the target that each belongs to, for targets the id of the query; -1
            for none.
        offset: global number of the first column, or None where all columns are here.
    """

    operand: Operand
    sink: str
    ids: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    owners: torch.Tensor | None = None
    offset: int | None = None

    def narrow(self, start: int, stop: int) -> Columns:
        """Columns [start, stop) alone."""

        def cut(tensor):
            return None if tensor is None else tensor[start:stop]

        return Columns(
            self.operand.narrow_rows(start, stop), self.sink, cut(self.ids), cut(self.keep), cut(self.owners), (self.offset or 0) + start
        )


@dataclasses.dataclass
class Block:
    """Candidates shared by all rows: logits = scale * anchors @ candidates^T, some of them dropped.

    Args:
        anchors: (n, D). anchor_sink: "query", or "positive" for the rows' own targets.
        columns: the candidates. ids: pairs ((n,), (C,)); equal pairs are dropped, row ids are never -1.
        exclude: (n,) global number of the column that is the row itself or its positive.
        scale: what multiplies a cosine in the logit, 1 / temperature plus hardness.
    """

    anchors: Operand
    anchor_sink: str
    columns: Columns
    exclude: torch.Tensor
    scale: float | torch.Tensor
    ids: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @property
    def width(self) -> int:
        return self.columns.operand.rows

    def narrow(self, start: int, stop: int) -> Block:
        """The block over columns [start, stop) alone."""
        ids = tuple((own, columns[start:stop]) for own, columns in self.ids)
        return dataclasses.replace(self, columns=self.columns.narrow(start, stop), ids=ids)


@dataclasses.dataclass
class Direction:
    """One softmax a row; all (n,). `weight` multiplies row losses, and is 0 for rows left out. Cosines carry `row_scale`."""

    blocks: list[Block]
    problem: Problem
    weight: torch.Tensor
    threshold: torch.Tensor | None  # cosine above which a negative is dropped
    active: torch.Tensor | None  # bool: rows that see the blocks at all (not own_negatives_only)
    forward: bool

    @property
    def positive(self) -> torch.Tensor:
        """Cosine of each row's positive."""
        return self.problem.positive


@dataclasses.dataclass
class Problem:
    """This rank's rows. `positives` (n,) index its own targets, in range even for rows left out; `active_rows` (n,) bool, None for all.

    `own_targets`: (n, D) the rows' positives, without an index where they lie in a regular step. `step`: of the default positives,
    row i's being target i * step; None where the caller named them. `row_scale`: (n,) at most 1, None where all rows share one temperature.
    """

    options: InfoNCEOptions
    backend: RowOperations  # a `backend.Backend`; here its operations on rows are enough
    dtype: torch.dtype
    inverse_temperature: float | torch.Tensor
    query: Operand  # (n, D)
    target: Operand  # (m, D), own targets
    own_targets: Operand
    positives: torch.Tensor
    step: int | None
    active_rows: torch.Tensor | None
    row_weight: torch.Tensor  # (n,) weights over the mean's denominator, 0 where not active
    first_row: int = 0  # global numbers of this rank's first row and target
    first_target: int = 0
    row_scale: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.query.source.device

    @functools.cached_property
    def positive(self) -> torch.Tensor:
        """(n,) cosines of the positives, `row_scale` in them, worked out where somebody asks."""
        return self.times_row_scale(self.backend.row_dots(self.query, self.own_targets))

    def times_row_scale(self, values: torch.Tensor, rows: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """(r,) numbers of these rows with the rows' own factor."""
        return values if self.row_scale is None else values * self.row_scale[rows]

    def true_cosine(self, cosine: torch.Tensor) -> torch.Tensor:
        """(n,) cosines without `row_scale`, as statistics tell them."""
        return cosine if self.row_scale is None else cosine / self.row_scale

    @property
    def active(self) -> torch.Tensor:
        """(n,) bool: rows that count."""
        if self.active_rows is None:
            return torch.ones(self.query.rows, dtype=torch.bool, device=self.device)
        return self.active_rows

    @property
    def product_dtype(self) -> torch.dtype:
        return product_dtype(self.query.source, self.target.source)

    def own_rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """(n, D) view of a target-shaped matrix: the rows of `own_targets`, which has no index."""
        rows = self.query.rows
        step = len(matrix) // rows
        return matrix[: rows * step : step]

    def largest_product(self) -> float:
        """The greatest |cos| between rows at hand that Cauchy and Schwarz allow; waits for the device."""
        longest = [norms(x.source, x.dtype, x.keep).max().item() for x in (self.query, self.target)]
        return max(longest) ** 2


def default_positives(rows: int, targets: int, device) -> torch.Tensor:
    """Each positive followed by its own negatives, VLM2Vec's layout: i * (M // N)."""
    step = targets // rows
    return torch.arange(0, rows * step, step, device=device)


def build(
    query: torch.Tensor,
    target: torch.Tensor,
    options: InfoNCEOptions,
    backend: RowOperations,
    rank: int = 0,
    all_sum: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> Problem:
    """Prepare this rank's rows. `query` (n, D), `target` (m, D) are its own; `all_sum` adds a tensor over ranks."""
    device, n, dtype = query.device, len(query), compute_dtype(query, target)
    step = active = None
    if options.positives is None:
        positives, step = default_positives(n, len(target), device), len(target) // n
    else:
        active = options.positives != options.ignore_index
        positives = torch.where(active, options.positives, 0)
    if options.query_mask is not None:
        active = options.query_mask if active is None else active & options.query_mask
    if options.target_mask is not None:
        target_active = options.target_mask[positives]
        active = target_active if active is None else active & target_active
    own_query = operand(query, dtype, options.normalize, options.query_mask, backend)
    own_target = operand(target, dtype, options.normalize, options.target_mask, backend)
    if step is not None and backend.strided_positives:
        own_targets = own_target.every(step, n)
    else:
        own_targets = own_target.gathered(positives)
    temperature, row_scale = _temperatures(options.temperature, device, dtype)
    return Problem(
        options,
        backend,
        dtype,
        _inverse_temperature(temperature, device, dtype),
        own_query,
        own_target,
        own_targets,
        positives,
        step,
        active,
        _row_weight(options, active, n, dtype, device, all_sum),
        rank * n,
        rank * len(target),
        row_scale,
    )


def _temperatures(temperature, device, dtype) -> tuple[float | torch.Tensor, torch.Tensor | None]:
    """One temperature for all rows, and what makes it each row's own."""
    if not isinstance(temperature, torch.Tensor) or temperature.dim() == 0:
        return temperature, None
    temperature = temperature.detach().to(device=device, dtype=dtype)
    least = temperature.min()
    return least, least / temperature


def _row_weight(options: InfoNCEOptions, active, n: int, dtype, device, all_sum) -> torch.Tensor:
    """(n,) weights over the mean's denominator, 0 where not active."""
    if options.weight is None and active is None and options.group is None:
        return torch.full((n,), 1 / n if options.reduction == "mean" else 1.0, dtype=dtype, device=device)
    weight = torch.ones(n, dtype=dtype, device=device) if options.weight is None else options.weight.to(dtype).contiguous()
    weight = weight if active is None else torch.where(active, weight, 0)
    if options.reduction == "mean":
        total = all_sum(weight.sum())
        weight = weight / torch.where(total == 0, 1, total)
    return weight


def operand(matrix: torch.Tensor, dtype: torch.dtype, normalize: bool, mask: torch.Tensor | None, backend: RowOperations) -> Operand:
    return Operand(matrix, dtype, backend.inverse_norms(matrix, dtype, EPS, mask) if normalize else None, mask)


def own_columns(problem: Problem) -> tuple[Columns, Columns]:
    """This rank's queries and targets as candidates."""
    o = problem.options
    owners = None
    if o.symmetric and (o.positives is not None or o.target_ids is not None):
        # a masked row still belongs to its target
        has_positive = torch.ones_like(problem.active) if o.positives is None else o.positives != o.ignore_index
        owners = torch.where(has_positive, _identity(problem), -1)
    queries = Columns(problem.query, "query", o.query_ids, o.query_mask, owners)
    return queries, Columns(problem.target, "target", o.target_ids, o.target_mask, o.target_query_ids)


def _identity(problem: Problem) -> torch.Tensor:
    """(n,) what tells rows' targets apart: the target's id, or, where it has none, its position (never equal to an id)."""
    position = UNMATCHABLE + 1 + problem.first_target + problem.positives
    if problem.options.target_ids is None:
        return position
    ids = problem.options.target_ids[problem.positives]
    return torch.where(ids == -1, position, ids)


def _inverse_temperature(temperature, device, dtype) -> float | torch.Tensor:
    """A float wherever that needs no wait for a GPU, so that it can ride on the GEMM's alpha."""
    if isinstance(temperature, torch.Tensor):
        if temperature.device.type == "cpu":
            return 1.0 / temperature.item()
        return temperature.detach().to(device=device, dtype=dtype).reciprocal()
    return 1.0 / float(temperature)


def _threshold(problem: Problem) -> torch.Tensor | None:
    options, bounds = problem.options, []
    if options.mask_margin is not None:
        margin = options.mask_margin if problem.row_scale is None else options.mask_margin * problem.row_scale
        bounds.append(problem.positive + margin)
    if options.mask_relative is not None:
        bounds.append(problem.positive + options.mask_relative * problem.positive.abs())
    if not bounds:
        return None
    return bounds[0] if len(bounds) == 1 else torch.minimum(*bounds)


def matchable(ids: torch.Tensor) -> torch.Tensor:
    """Row ids with -1 turned into a value that no column bears."""
    return torch.where(ids == -1, UNMATCHABLE, ids)


def directions(problem: Problem, queries: Columns, targets: Columns) -> list[Direction]:
    """The softmaxes of this rank's rows over the given columns; for a ring, the part of them that these columns are."""
    o, positives = problem.options, problem.positives
    anchors, own_targets = problem.query.scaled(problem.row_scale), problem.own_targets.scaled(problem.row_scale)
    active = None if o.own_negatives_only is None else ~o.own_negatives_only
    scale = problem.inverse_temperature
    scale = scale + o.hardness if o.hardness_scope in ("all", "in_batch") else scale
    myself = None
    if o.symmetric or o.query_negatives:
        myself = torch.arange(problem.first_row, problem.first_row + problem.query.rows, device=problem.device)
    my_positive = positives + problem.first_target if problem.first_target else positives
    query_ids = () if o.query_ids is None else ((matchable(o.query_ids), queries.ids),)
    target_ids = () if o.target_ids is None else ((matchable(o.target_ids[positives]), targets.ids),)
    if o.target_query_ids is not None:
        target_ids += ((matchable(o.query_ids), targets.owners),)

    blocks = [Block(anchors, "query", targets, my_positive, scale, target_ids)]
    if o.query_negatives:
        blocks.append(Block(anchors, "query", queries, myself, scale, query_ids))
    if o.target_negatives:
        blocks.append(Block(own_targets, "positive", targets, my_positive, scale, target_ids))
    weight = problem.row_weight * 0.5 if o.symmetric else problem.row_weight
    threshold = _threshold(problem)
    out = [Direction(blocks, problem, weight, threshold, active, forward=True)]
    if o.symmetric:
        ids = query_ids
        if queries.owners is not None:
            ids += ((_identity(problem), queries.owners),)
        reverse = Block(own_targets, "positive", queries, myself, scale, ids)
        out.append(Direction([reverse], problem, weight, threshold, active, forward=False))
    return out
