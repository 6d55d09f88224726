"""The loss over a process group: each rank's rows against everyone's columns.

* gather: columns of all ranks come to every rank, one sweep a direction, gradients of columns are reduce-scattered.
* ring: columns and, on the second turn, their gradients travel from rank to rank; nothing larger than a shard is held.
  Sums first, then gradients: 8 n M D FLOP instead of 6.

Loss and statistics are those of the global batch, equal on all ranks. Every gradient is world_size times the derivative
of the global loss with respect to this rank's tensor, so that a mean over ranks (DDP, FSDP) leaves the global gradient.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from ..checks import may_look
from ..stats import row_sums
from .backend import Backend
from .gradients import Computed, Gradients, finish_gradients
from .hard_negatives import hard_negatives
from .operands import Operand
from .problem import Columns, Problem, build, directions, own_columns
from .reduce import reduce_directions
from .softmax import RowSums, finish

# names of torch 2.14; the older ones are deprecated there
gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def one_width(query, target, options, wanted, workspace: int, backend: Backend) -> Computed:
    """What `compute` does for one width, over `options.group`."""
    group, rank = options.group, dist.get_rank(options.group)
    check_equal_shards(query, target, options.validate, group)

    def all_sum(tensor):
        dist.all_reduce(tensor, group=group)
        return tensor

    problem = build(query, target, options, backend, rank, all_sum)
    gradients = Gradients(problem, wanted) if wanted else None
    columns = own_columns(problem)
    if options.exchange == "ring":
        out = _ring(problem, columns, gradients, workspace)
    else:
        need_queries = options.symmetric or options.query_negatives
        queries = gather(columns[0], "all_queries", group) if need_queries else columns[0]
        targets = gather(columns[1], "all_targets", group)
        out = reduce_directions(problem, directions(problem, queries, targets), gradients, workspace)
        if gradients is not None:
            scatter(gradients, "all_targets", "target", target, group)
            if need_queries:
                scatter(gradients, "all_queries", "query", query, group)
    out.loss = all_sum(out.loss)
    if out.stat_sums is not None:
        out.stat_sums = all_sum(out.stat_sums)
    if gradients is not None:
        for accumulator in gradients.accumulators.values():
            accumulator.mul_(dist.get_world_size(group))
        if gradients.wants("temperature"):
            gradients.temperature *= dist.get_world_size(group)
        finish_gradients(problem, gradients, out)
    return out


def check_equal_shards(query, target, validate: bool, group) -> None:
    """Every rank must hold as many rows as every other. On CUDA only with validate=True: looking waits for the device."""
    if not may_look(query, validate):
        return
    mine = torch.tensor([len(query), len(target), query.shape[1]], device=query.device)
    everyone = torch.empty(dist.get_world_size(group) * 3, dtype=mine.dtype, device=query.device)
    gather_single(everyone, mine, group=group)
    shapes = everyone.view(-1, 3).tolist()
    if any(shape != shapes[0] for shape in shapes):
        listed = "; ".join(f"rank {r}: {n} queries, {m} targets, D={d}" for r, (n, m, d) in enumerate(shapes))
        raise ValueError(
            f"group: expected equal shards on every rank, got {listed}; pad short ranks and mask the padding with "
            "query_mask, target_mask and ignore_index"
        )


def _all_gather(tensor: torch.Tensor | None, group) -> torch.Tensor | None:
    """Concatenate over ranks, whatever the dtype: the bytes travel, so bool and bfloat16 work on every backend."""
    if tensor is None:
        return None
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    out = torch.empty(dist.get_world_size(group) * flat.numel(), dtype=torch.uint8, device=tensor.device)
    gather_single(out, flat, group=group)
    return out.view(tensor.dtype).view(-1, *tensor.shape[1:])


def _fields(columns: Columns) -> list[torch.Tensor | None]:
    operand = columns.operand
    return [operand.source, operand.inverse_norm, columns.ids, columns.keep, columns.owners]


def _with_fields(columns: Columns, fields, **changes) -> Columns:
    source, inverse, ids, keep, owners = fields
    operand = Operand(source, columns.operand.dtype, inverse, keep)
    return dataclasses.replace(columns, operand=operand, ids=ids, keep=keep, owners=owners, **changes)


def gather(columns: Columns, sink: str, group) -> Columns:
    return _with_fields(columns, [_all_gather(field, group) for field in _fields(columns)], sink=sink)


def scatter(gradients: Gradients, name: str, sink: str, like: torch.Tensor, group) -> None:
    """Sum a gradient of gathered columns over ranks and add this rank's part to its own accumulator."""
    if not gradients.wants(sink):
        return
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    gathered = gradients.of(name, world * len(like))
    accumulator = gradients.of(sink, len(like))
    if gathered.is_cuda:
        part = torch.empty_like(accumulator)
        reduce_scatter_single(part, gathered, group=group)
    else:
        dist.all_reduce(gathered, group=group)  # gloo
        part = gathered[rank * len(like) : (rank + 1) * len(like)]
    accumulator.add_(part)
    del gradients.accumulators[name]


def _rotate(tensors: list[torch.Tensor | None], group) -> list[torch.Tensor | None]:
    """Send every tensor to the next rank, receive the previous rank's."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if world == 1:
        return tensors
    after, before = (dist.get_global_rank(group, (rank + step) % world) for step in (1, -1))
    out, operations = [], []
    for tensor in tensors:
        if tensor is None:
            out.append(None)
            continue
        sent = tensor.contiguous().view(-1).view(torch.uint8)
        received = torch.empty_like(sent)
        operations += [dist.P2POp(dist.isend, sent, after, group), dist.P2POp(dist.irecv, received, before, group)]
        out.append(received.view(tensor.dtype).view(tensor.shape))
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return out


def _ring(problem: Problem, columns: tuple[Columns, Columns], gradients: Gradients | None, workspace: int):
    o, group = problem.options, problem.options.group
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    need_queries = o.symmetric or o.query_negatives

    def turn():
        """Directions over one rank's columns after another, this rank's own first."""
        travelling = [_fields(side) for side in columns]
        for step in range(world):
            owner = (rank - step) % world
            queries = _with_fields(columns[0], travelling[0], sink="all_queries", offset=owner * problem.query.rows)
            targets = _with_fields(columns[1], travelling[1], sink="all_targets", offset=owner * problem.target.rows)
            yield directions(problem, queries, targets)
            if step + 1 < world:
                travelling = [_rotate(travelling[0], group) if need_queries else travelling[0], _rotate(travelling[1], group)]

    local = directions(problem, *columns)
    hard = None if o.hard_negatives is None else hard_negatives(problem, local[0])
    n, smoothing = problem.query.rows, bool(o.label_smoothing)
    sums = [RowSums.empty(n, problem.dtype, problem.device, smoothing) for _ in local]
    if hard is not None:
        sums[0].add(slice(0, n), hard.sums)
    for parts in turn():
        for direction, running in zip(parts, sums):
            problem.backend.sum_shard(problem, direction, workspace, running, o.return_stats and direction.forward)
    logit = problem.positive * problem.inverse_temperature
    results = [finish(running, logit, o.label_smoothing) for running in sums]
    loss, stat_sums = torch.zeros_like(problem.row_weight), None
    for direction, running, result in zip(local, sums, results):
        loss += torch.where(direction.weight != 0, direction.weight * result.loss, 0)
        if direction.forward and o.return_stats:
            stat_sums = row_sums(problem.active, result.lse, problem.true_cosine(direction.positive), problem.true_cosine(running.best))
    if gradients is not None:
        for parts in turn():
            for direction, running, result in zip(parts, sums, results):
                problem.backend.differentiate_shard(problem, direction, workspace, running, result, logit, gradients)
            # the columns' gradients travel with them; after a whole turn they are home
            for name in ("all_queries", "all_targets"):
                if name in gradients.accumulators:
                    gradients.accumulators[name] = _rotate([gradients.accumulators[name]], group)[0]
        for name, sink, rows in (("all_queries", "query", n), ("all_targets", "target", problem.target.rows)):
            if name in gradients.accumulators:
                gradients.of(sink, rows).add_(gradients.accumulators.pop(name))
        for direction, result in zip(local, results):
            gradients.add_positives(direction, result.positive * direction.weight * problem.inverse_temperature)
        if hard is not None:
            hard.add_gradients(local[0], results[0], gradients)
    return Computed(loss.sum(), stat_sums=stat_sums)
