"""One step of a recipe under fake tensors: its peak of live bytes by part, its FLOPs and a predicted time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from train import plan_model, sharding
from train.build import trained_parameters
from train.plan_meter import Meter, Work
from train.plan_step import PlannedStep
from train.recipe import Recipe

_BUCKET_BYTES = 64 * 2**20  # of DDP's one synchronisation


@dataclass
class Simulation:
    """What a simulated step took. Bytes are of one rank's device.

    Attributes:
        peak: most live bytes at one time; `parts`: what they were.
        resident: bytes that are there between steps.
        largest: (bytes, tokens) of the chunk that needs most beyond what stood before it.
        chunks: of the step, on this rank; `kept`: those whose graph is kept.
        gathered: bytes of weights that one pass over the model gathers from other ranks.
    """

    peak: int
    parts: dict[str, int]
    resident: int
    largest: tuple[int, int]
    chunks: int
    kept: int
    work: Work
    trained: int
    weights: int
    gathered: int = 0


def simulate(
    recipe: Recipe, batch: dict[str, Any] | None, *, ranks: int = 1, flop_rate: float = 1e14, byte_rate: float = 1e12, flash: bool = True,
    make_batch=None, most_chunks: int = 8,
) -> Simulation:  # fmt: skip
    """Runs rank 0's step.

    Args:
        batch: what `train.data.collate` made for it, or None and `make_batch(processing)`.
        most_chunks: how many are run one by one; beyond it some stand for their neighbours.
        flash: attention as on a GPU; False: as the CPU does it, to compare with a run there.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = plan_model.fake_model(recipe, mode).train()
    batch = make_batch(model.processing) if batch is None else batch
    counts = trained_parameters(model)
    with _sharded(recipe, model, mode, ranks) as is_sharded:
        tensors = [*model.parameters(), *model.buffers()]
        meter = Meter(tensors, flop_rate, byte_rate)
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: meter.relabel(p.grad, "gradients"))
        optimizer = plan_model.optimizer(recipe, trained, on_gpu=flash)
        with mode, meter:
            _make_state(optimizer, trained, meter)
            resident = meter.current
            meter.restart_peak()
            meter.work.clear()
            step = PlannedStep(recipe, model, mode, meter, ranks=ranks, flash=flash)
            if is_sharded:
                step.gradcache.after_chunk = lambda: _label_gradients(model, meter)
            step.gradcache.most_chunks = most_chunks
            with meter.booking(None):
                step(batch)
                meter.relabel([p.grad for p in trained], "gradients")
                if ranks > 1 and not is_sharded:
                    _synchronise(trained, meter)
                if recipe.max_grad_norm and not is_sharded:
                    torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
                with meter.counting_as("optimizer"):
                    optimizer.step()
    cache = step.gradcache
    return Simulation(
        peak=meter.peak,
        parts={part: size for part, size in meter.at_peak.items() if size},
        resident=resident,
        largest=cache.largest,
        chunks=cache.count,
        kept=round(sum(cache.weights[-cache.retain :])) if cache.retain else 0,
        work=cache.total(),
        trained=counts[0],
        weights=counts[1],
        gathered=_gathered(model, recipe, ranks) if is_sharded else 0,
    )


def _gathered(model, recipe: Recipe, ranks: int) -> int:
    size = getattr(torch, recipe.autocast or recipe.dtype).itemsize
    return sum(p.numel() for p in model.parameters() if hasattr(p, "_local_tensor")) * size * (ranks - 1) // ranks


def _label_gradients(model, meter: Meter) -> None:
    """Gradients between two chunks: of plain weights, and the whole ones that FSDP2 holds until the last backward."""
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if hasattr(module, "_get_fsdp_state") else None
        for held in group.fsdp_params if group is not None else ():
            whole = getattr(held, "_unsharded_param", None)
            meter.relabel([held.unsharded_accumulated_grad, None if whole is None else whole.grad], "gradients")


def _make_state(optimizer: torch.optim.Optimizer, trained: list, meter: Meter) -> None:
    """Brings the optimizer to where it is from the second step on."""
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with meter.counting_as("optimizer"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _synchronise(trained: list, meter: Meter) -> None:
    """The flat buckets of DDP's synchronisation; the largest is there once."""
    sizes = [p.grad.nbytes for p in trained if p.grad is not None]
    with meter.counting_as("all-reduce bucket"):
        torch.empty(max(min(sum(sizes), _BUCKET_BYTES), max(sizes, default=0)), dtype=torch.uint8)


@contextlib.contextmanager
def _sharded(recipe: Recipe, model, mode: FakeTensorMode, ranks: int) -> Iterator[bool]:
    """The model as `train.run` shards it, over a process group that only says how many ranks there are."""
    if recipe.distributed != "fsdp" or ranks == 1:
        yield False
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
        with mode:
            sharding.shard(model, getattr(torch, recipe.autocast) if recipe.autocast else None, mesh)
        yield True
    finally:
        dist.destroy_process_group()


