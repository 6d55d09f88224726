"""One step of a recipe under fake tensors: its peak of live bytes by part, its FLOPs and a predicted time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from ..build import trained_parameters
from ..optimizers import planned_optimizer
from ..parallel import sharding
from ..recipe.schema import Recipe
from . import repeated_layers
from .fake import model as fake_model
from .fake.step import PlannedStep
from .meter import Cost, Meter
from .pieces import Frame, Piece

_ATTEMPTS = (1, 2, None)  # `outer` of `RepeatedLayers`, and all layers


@dataclass
class Simulation:
    """What a simulated step took. Bytes are of one rank's device.

    Attributes:
        peak: most live bytes at one time; `parts`: what they were.
        resident: bytes that are there between steps.
        largest: (bytes, tokens) of the chunk that needs most beyond what stood before it.
        chunks: of the step, on this rank; `kept`: those whose graph is kept; `graphs`: bytes of each of these, in order.
        gathered: bytes of weights that one pass over the model gathers from other ranks.
        reduced: bytes that a rank sends when gradients are reduced, once a step.
        outer: which layers were run (`RepeatedLayers`), None for all of them.
        pieces, frame: what the step was put together from (`train.plan.pieces`). shapes: (tokens, image tokens, patches) of each
            sample, by side.
    """

    peak: int
    parts: dict[str, int]
    resident: int
    largest: tuple[int, int]
    chunks: int
    kept: int
    graphs: list[int]
    cost: Cost
    trained: int
    weights: int
    gathered: int = 0
    reduced: int = 0
    outer: int | None = None
    pieces: list[Piece] = field(default_factory=list)
    frame: Frame | None = None
    shapes: list[list[tuple[int, int, int]]] = field(default_factory=list)


def simulate(
    recipe: Recipe,
    batch: dict[str, Any] | None,
    *,
    ranks: int = 1,
    flop_rate: float = 1e14,
    byte_rate: float = 1e12,
    dispatch: float = 0.0,
    flash: bool = True,
    make_batch=None,
    most_chunks: int = 8,
    every_layer: bool = False,
    is_sample: bool = False,
    outer: int | None = 1,
) -> Simulation:
    """Runs rank 0's step.

    Args:
        batch: what `train.data.rows.collate` made for it, or None and `make_batch(processing)`.
        most_chunks: how many are run one by one; beyond it some stand for their neighbours.
        every_layer: also run layers that are alike, of which a few tell what the others take.
        flash: attention as on a GPU; False: as the CPU does it, to compare with a run there.
        flop_rate, byte_rate, dispatch: of a `Meter`.
        outer: `outer` of a step of this model that was simulated before: where layers turned out not alike, it is not tried again.
        is_sample: chunks of several sizes are run in place of the step's own, for what they take one by one: peak and cost are no step's.
    """
    rates = flop_rate, byte_rate, dispatch
    attempts = (None,) if every_layer else _ATTEMPTS[_ATTEMPTS.index(outer) :]
    for attempt in attempts[:-1]:
        try:
            return _simulated(recipe, batch, ranks, rates, flash, make_batch, most_chunks, is_sample, attempt)
        except repeated_layers.LayersDiffer:
            pass
    return _simulated(recipe, batch, ranks, rates, flash, make_batch, most_chunks, is_sample, attempts[-1])


def _simulated(
    recipe, batch, ranks: int, rates: tuple[float, ...], flash: bool, make_batch, most_chunks: int, is_sample: bool, outer: int | None
) -> Simulation:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = fake_model.fake_model(recipe, mode).train()
    batch = make_batch(model.processing) if batch is None else batch
    counts = trained_parameters(model)
    is_sharded = recipe.distributed == "fsdp" and ranks > 1
    with _ranks(ranks):
        if is_sharded:
            _shard(recipe, model, mode, ranks)
        meter = Meter([*model.parameters(), *model.buffers()], *rates)
        gathered = _gathered(model, recipe, ranks) if is_sharded else 0
        trained = [p for p in model.parameters() if p.requires_grad]
        # Shards as plain tensors: the optimizer's own dispatch over hundreds of sharded ones takes longer than the step.
        plain = [nn.Parameter(p._local_tensor) if is_sharded and hasattr(p, "_local_tensor") else p for p in trained]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: meter.relabel(p.grad, "gradients"))
        optimizer = planned_optimizer(recipe, plain, on_gpu=flash)
        repeated = None if outer is None else repeated_layers.RepeatedLayers(model, meter, is_sharded, outer)
        with mode, meter, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # what is returned is not written to
            buckets = _reducer(trained, meter) if ranks > 1 and not is_sharded else None  # noqa: F841  keeps them alive
            _make_state(optimizer, plain, meter)
            resident = meter.current
            meter.restart_peak()
            meter.costs.clear()
            step = PlannedStep(
                recipe,
                model,
                mode,
                meter,
                trained=trained,
                ranks=ranks,
                is_sharded=is_sharded,
                flash=flash,
                most_chunks=most_chunks,
                is_sample=is_sample,
                after_chunk=(lambda: _label_gradients(model, repeated, meter)) if is_sharded else (lambda: None),
            )
            with meter.booking(None):
                step(batch)
                with step.account.ending():
                    meter.relabel([p.grad for p in trained], "gradients")
                    if recipe.max_grad_norm and not is_sharded:
                        torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
                    if is_sharded:
                        _hand_over_gradients(trained, plain, repeated, mode)
                    with meter.counting_as("optimizer"):
                        optimizer.step()
    account = step.account
    return Simulation(
        peak=meter.peak,
        parts={part: size for part, size in meter.at_peak.items() if size},
        resident=resident,
        largest=account.largest,
        chunks=account.count,
        kept=account.kept,
        graphs=account.graphs,
        cost=account.total(),
        trained=counts[0],
        weights=counts[1],
        gathered=gathered,
        reduced=_reduced(trained, recipe, ranks, is_sharded),
        outer=outer,
        pieces=account.pieces(),
        frame=account.frame(resident),
        shapes=account.shapes,
    )


def _gathered(model, recipe: Recipe, ranks: int) -> int:
    size = getattr(torch, recipe.autocast or recipe.dtype).itemsize
    return sum(p.numel() for p in model.parameters() if hasattr(p, "_local_tensor")) * size * (ranks - 1) // ranks


def _reduced(trained: list, recipe: Recipe, ranks: int, is_sharded: bool) -> int:
    """A reduction sends a rank's gradients once where each keeps its share, twice where all keep all."""
    size = sum(p.numel() * (4 if is_sharded and recipe.autocast else p.element_size()) for p in trained)
    return size * (ranks - 1) // ranks * (1 if is_sharded else 2)


def _label_gradients(model, repeated: repeated_layers.RepeatedLayers | None, meter: Meter) -> None:
    """Gradients between two chunks: of plain weights, and the whole ones that FSDP2 holds until the last backward."""
    for module in model.modules():
        group = module._get_fsdp_state()._fsdp_param_group if hasattr(module, "_get_fsdp_state") else None
        for parameter_group in group.fsdp_params if group is not None else ():
            unsharded = getattr(parameter_group, "_unsharded_param", None)
            meter.relabel([parameter_group.unsharded_accumulated_grad, None if unsharded is None else unsharded.grad], "gradients")
    if repeated is not None:
        repeated.label_gradients()


def _hand_over_gradients(trained: list, plain: list, repeated: repeated_layers.RepeatedLayers | None, mode: FakeTensorMode) -> None:
    """Shards of the gradients, to the plain tensors that the optimizer knows the shards of the weights as."""
    counted = set() if repeated is None else {id(p) for p in repeated.sharded_weights()}
    for parameter, local in zip(trained, plain, strict=True):
        if parameter.grad is not None:
            local.grad = getattr(parameter.grad, "_local_tensor", parameter.grad)
        elif id(parameter) in counted:
            with _disable_current_modes(), mode:  # no meter counts it: its bytes are there already
                local.grad = torch.empty_like(local)


def _make_state(optimizer: torch.optim.Optimizer, trained: list, meter: Meter) -> None:
    """Brings the optimizer to where it is from the second step on."""
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with meter.counting_as("optimizer"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _reducer(trained: list, meter: Meter) -> list[torch.Tensor]:
    """What DistributedDataParallel makes when it wraps a model and holds from then on: buckets of all gradients.

    A step reduces in buckets of its own (`gradient_sync.py`), which come on top and run here as they are.
    """
    with meter.counting_as("all-reduce buckets"):
        return [torch.empty_like(p) for p in trained]


@contextlib.contextmanager
def _ranks(ranks: int) -> Iterator[None]:
    """A process group that only says how many ranks there are, where there are several."""
    if ranks == 1:
        yield
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _shard(recipe: Recipe, model, mode: FakeTensorMode, ranks: int) -> None:
    """Shards the model as `train.run` does."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks,))
    with mode:
        sharding.shard(model, getattr(torch, recipe.autocast) if recipe.autocast else None, mesh)
