"""What one rank of the distributed tests runs: its shard of a case, against the single-process result of the whole."""

import functools
import os

import torch
import torch.distributed as dist

from contrastive_kernels import checks, distillation_loss, info_nce, info_nce_value_and_grad, sigmoid_loss
from tests.kernels.helpers import sampling
from tests.kernels.helpers.sampling import Case, random_sets

PER_ROW = ("query_ids", "query_mask", "own_negatives_only", "weight")
ALONE = {"sum", "none", "small_workspace"}  # refused over ranks, or taken by a call alone
PER_TARGET = ("target_ids", "target_query_ids", "target_mask")
NAMES = ("query", "target", "hard_negatives", "temperature")


def whole_case(seed, names, world):
    """A batch of `world` shards, whose positives stay inside their shard, and its options."""
    case = Case(seed, n=4 * world, m=8 * world)
    options = case.options(names)
    if "positives" in options:
        shard = torch.arange(case.n) // 4
        local = case.integers(0, 8, case.n)
        local[1] = local[0]
        options["positives"] = torch.where(options["positives"] < 0, -100, shard * 8 + local)
    return case, options


def shard_of(case, options, rank):
    rows, targets = slice(4 * rank, 4 * rank + 4), slice(8 * rank, 8 * rank + 8)
    out = dict(options)
    for name, value in options.items():
        if name in PER_ROW or (name == "temperature" and isinstance(value, torch.Tensor) and value.dim() == 1):
            out[name] = value[rows]
        elif name in PER_TARGET:
            out[name] = value[targets]
    if "positives" in options:
        out["positives"] = torch.where(options["positives"][rows] < 0, -100, options["positives"][rows] - 8 * rank)
    if "hard_offsets" in options:
        offsets = options["hard_offsets"][rows.start : rows.stop + 1]
        packed = slice(int(offsets[0]), int(offsets[-1]))
        out.update(
            hard_offsets=offsets - offsets[0], hard_negatives=options["hard_negatives"][packed], hard_ids=options["hard_ids"][packed]
        )
        return case.query[rows], case.target[targets], out, {"hard_negatives": packed}
    if "hard_negatives" in options:
        out.update({name: options[name][rows] for name in ("hard_negatives", "hard_ids") if name in options})
    return case.query[rows], case.target[targets], out, {"hard_negatives": rows}


def close(a, b, what):
    scale = max(1.0, b.abs().max().item() if b.numel() else 0.0)
    assert a.shape == b.shape and (not a.numel() or (a - b).abs().max() <= 1e-10 * scale), f"{what}: {a} against {b}"


def compare(seed, names, exchange, rank, world, group, backend="auto"):
    case, options = whole_case(seed, names, world)
    truth = info_nce_value_and_grad(case.query, case.target, return_stats=True, **options)
    query, target, own, slices = shard_of(case, options, rank)
    ours = info_nce_value_and_grad(query, target, return_stats=True, group=group, exchange=exchange, backend=backend, **own)
    close(ours.loss, truth.loss, "loss")
    for field in vars(truth.stats):
        close(getattr(ours.stats, field), getattr(truth.stats, field), field)
    slices.update(query=slice(4 * rank, 4 * rank + 4), target=slice(8 * rank, 8 * rank + 8))
    for name in NAMES[:3]:
        gradient = getattr(truth, "d_" + name)
        if gradient is not None:
            close(getattr(ours, "d_" + name), gradient[slices[name]] * world, f"d {name}")
    if truth.d_temperature is not None and truth.d_temperature.dim() == 1:
        close(ours.d_temperature, truth.d_temperature[slices["query"]] * world, "d temperature by row")
    elif truth.d_temperature is not None:
        mean = ours.d_temperature.clone()
        dist.all_reduce(mean, group=group)
        close(mean / world, truth.d_temperature, "d temperature")


def compare_all(rank, world, group, count, seed):
    fixed = [
        (),
        ("symmetric",),
        ("query_negatives", "target_negatives"),
        ("symmetric", "positives", "target_ids", "query_ids"),
        ("target_mask", "query_mask"),
        ("hardness", "hard"),
        ("hardness_hard", "packed_hard", "symmetric"),
        ("hardness_in_batch", "hard_with_ids", "learnt_temperature"),
        ("row_temperatures", "symmetric", "margin", "hard"),
    ]
    sets = fixed + [tuple(n for n in names if n not in ALONE) for names in random_sets(count, seed)]
    sets += [(name,) for name in sampling.NAMES if name not in ALONE.union(*sets)]  # every option at least once
    for index, names in enumerate(sets):
        for exchange in ("gather", "ring"):
            try:
                compare(index, names, exchange, rank, world, group)
            except Exception as error:
                raise AssertionError(f"{names}, seed {index}, {exchange}, rank {rank} of {world}") from error


def through_autograd(rank, world, group):
    """A mean over ranks of a shared weight's gradient, as DDP takes it, is the gradient of the whole batch."""
    case, options = whole_case(3, ("symmetric", "learnt_temperature"), world)
    query, target, own, _ = shard_of(case, options, rank)

    def gradients(q, t, **kwargs):
        weight = torch.eye(case.d, dtype=torch.float64).mul(1.1).requires_grad_()
        temperature = options["temperature"].clone().requires_grad_()
        loss = info_nce(q @ weight, t @ weight, normalize=True, **{**kwargs, "temperature": temperature})
        return torch.autograd.grad(loss, (weight, temperature))

    truth = gradients(case.query, case.target, symmetric=True)
    for exchange in ("gather", "ring"):
        for mine, whole in zip(gradients(query, target, symmetric=True, group=group, exchange=exchange), truth):
            mine = mine.clone()
            dist.all_reduce(mine, group=group)
            close(mine / world, whole, f"autograd {exchange}")


def sigmoid(rank, world, group):
    """Value and gradients of the sigmoid loss, positives, ids that cross ranks, masks and weights included."""
    for seed, names in enumerate(
        [(), ("positives",), ("target_ids", "weight"), ("query_mask", "target_mask"), ("target_ids", "query_ids"), ("normalize",)]
    ):
        case, options = whole_case(seed, names, world)
        for name in ("temperature", "symmetric", "query_negatives"):
            options.pop(name, None)
        scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (7.0, -4.0))
        query, target, own, _ = shard_of(case, options, rank)

        def gradients(q, t, **kwargs):
            leaves = [x.clone().requires_grad_() for x in (q, t, scale, bias)]
            loss = sigmoid_loss(*leaves[:2], scale=leaves[2], bias=leaves[3], **kwargs)
            return loss.detach(), torch.autograd.grad(loss, leaves)

        loss, truth = gradients(case.query, case.target, **options)
        for exchange in ("gather", "ring"):
            mine, found = gradients(query, target, group=group, exchange=exchange, **own)
            close(mine, loss, f"sigmoid loss {names} {exchange}")
            close(found[0], truth[0][4 * rank : 4 * rank + 4] * world, f"sigmoid d query {names} {exchange}")
            close(found[1], truth[1][8 * rank : 8 * rank + 8] * world, f"sigmoid d target {names} {exchange}")
            for part, whole in zip(found[2:], truth[2:]):
                part = part.clone()
                dist.all_reduce(part, group=group)
                close(part / world, whole, f"sigmoid scale or bias {names} {exchange}")


def distillation(rank, world, group):
    """Value and gradients of the distillation, in one direction and in both, weights included."""
    generator = torch.Generator().manual_seed(5)
    n, rows = 3 * world, slice(3 * rank, 3 * rank + 3)
    matrices = [torch.randn(n, width, generator=generator, dtype=torch.float64) for width in (6, 6, 9, 9)]
    for options in ({}, {"symmetric": True}, {"symmetric": True, "weight": torch.rand(n, generator=generator)}):
        own = {name: value[rows] if name == "weight" else value for name, value in options.items()}

        def gradients(matrices, **options):
            leaves = [x.clone().requires_grad_() for x in (*matrices[:2], torch.tensor(0.2, dtype=torch.float64))]
            loss = distillation_loss(*leaves[:2], *matrices[2:], temperature=leaves[2], normalize=True, **options)
            return loss.detach(), torch.autograd.grad(loss, leaves)

        loss, truth = gradients(matrices, **options)
        mine, found = gradients([x[rows] for x in matrices], group=group, **own)
        close(mine, loss, f"distillation {list(options)}")
        for part, whole in zip(found[:2], truth[:2]):
            close(part, whole[rows] * world, f"distillation gradient {list(options)}")
        mean = found[2].clone()
        dist.all_reduce(mean, group=group)
        close(mean / world, truth[2], f"distillation d temperature {list(options)}")


def refusals(rank, group):
    query, target = torch.randn(4 + rank, 8), torch.randn(8 + 2 * rank, 8)

    def refused(loss, word, **options):
        try:
            loss(query, target, group=group, **options)
        except ValueError as error:
            assert word in str(error), error
        else:
            raise AssertionError(f"{options} was accepted")

    losses = info_nce, functools.partial(sigmoid_loss, scale=5.0, bias=0.0)
    for loss in losses:
        refused(loss, "equal shards")
        refused(loss, "reduction", reduction="sum")
        refused(loss, "reduction", reduction="none")
    checks.waits_for_device = lambda tensor: True  # as on a GPU
    for loss in losses:
        refused(loss, "equal shards", validate=True)


def run(rank, world, path, count):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    compare_all(rank, world, dist.group.WORLD, count, seed=world)
    through_autograd(rank, world, dist.group.WORLD)
    sigmoid(rank, world, dist.group.WORLD)
    distillation(rank, world, dist.group.WORLD)
    refusals(rank, dist.group.WORLD)
    if world == 4:
        halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        compare_all(rank // 2, 2, halves[rank % 2], 4, seed=7)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process whose peer left first
