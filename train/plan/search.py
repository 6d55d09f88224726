"""What a recipe will need and take, before it is paid for; and the largest chunk budget that fits.

The recipe's own step runs under fake tensors (`train.plan.simulate`); nothing is downloaded where the model's config is a
file here, no weight is read or allocated. Everything printed is predicted; the page ends with what cannot be known.

torch's FSDPMemTracker is not used: it raises on frozen parameters, which adapters leave, and on a second forward, which GradCache makes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..recipe.schema import Recipe
from . import batch as plan_batch
from .gpus import Gpu
from .simulate import Simulation, simulate

CONTEXT_GIB = 0.75  # CUDA context and libraries
FRAGMENTATION = 0.04  # of the rest: rounding and gaps of the allocator
_GIB = 2**30
_STEP = 256  # chunk budgets are multiples of it
_TRIALS, _NEAR = 4, 1.03  # of the search for the largest; a gain below it ends the search


@dataclass
class Plan:
    """`simulation` of a rank's step on `gpu`, and what follows from it."""

    recipe: Recipe
    name: str
    gpu: Gpu
    ranks: int
    efficiency: float
    simulation: Simulation
    largest_chunk: int | None
    measured_rows: bool  # the recipe's own first batch, not the rows it assumes
    tokens: int  # of a rank's batch
    longest: int
    media: tuple[int, int]  # decoded bytes of a rank's batch, of its largest sample
    streamed: bool

    @property
    def usable(self) -> int:
        return usable(self.gpu)

    @property
    def fits(self) -> bool:
        return self.simulation.peak <= self.usable

    @property
    def link_seconds(self) -> float:
        """Collectives of a step where weights are sharded: gathers of each pass over a chunk, one reduction; not hidden."""
        s = self.simulation
        passes = 3 * s.chunks - s.kept
        return (passes * s.gathered + 2 * s.gathered) / (self.gpu.link_gb_s * 1e9)

    @property
    def step_seconds(self) -> float:
        return self.simulation.cost.seconds + self.link_seconds


def usable(gpu: Gpu) -> int:
    return int((gpu.gib - CONTEXT_GIB) * (1 - FRAGMENTATION) * _GIB)


def make_plan(recipe: Recipe, gpu: Gpu, ranks: int = 1, *, name: str = "", efficiency: float | None = None) -> Plan:
    """Simulates a step, and another one with the largest chunk budget that should fit.

    Args:
        efficiency: share of the GPU's data sheet that matrix products reach; None: what its large products are known to reach.

    Raises:
        ValueError: the recipe contradicts itself, has no rows to plan with, or a sample is longer than its chunk budget.
    """
    recipe.check_ranks(ranks)
    at_hand = plan_batch.has_data(recipe)
    if not at_hand and recipe.plan is None:
        raise ValueError(f"data.root {recipe.data.root} is not a folder here; say in `plan.rows` what a batch looks like, or copy the data")
    made: dict[str, Any] = {}

    def batch(processing: Any) -> dict[str, Any]:
        if "batch" not in made:
            make = plan_batch.first_batch if at_hand else plan_batch.assumed_batch
            made["batch"] = make(recipe, processing, ranks)
            made["media"] = plan_batch.decoded_total(processing, made["batch"])
        return made["batch"]

    efficiency = gpu.reached if efficiency is None else efficiency
    rates = {"flop_rate": gpu.tflops * 1e12 * efficiency, "byte_rate": gpu.tb_s * 1e12 * gpu.reached_bandwidth}

    def run(changed: Recipe, most_chunks: int) -> Simulation:
        return simulate(changed, None, ranks=ranks, make_batch=batch, most_chunks=most_chunks, **rates)

    chosen = recipe
    if recipe.retain == "auto":
        chosen = replace(recipe, retain=_automatic(recipe, gpu, run(replace(recipe, retain=0), 8)))
    result = run(chosen, 8)
    longest = plan_batch.longest(made["batch"])
    if recipe.chunk_rows is None and recipe.chunk_tokens < longest:
        raise ValueError(
            f"chunk_tokens ({recipe.chunk_tokens}) is below the longest sample ({longest} tokens); "
            "raise it, or lower the image limits in model_options"
        )
    largest = None if recipe.chunk_rows else _largest_chunk(chosen, gpu, result, longest, plan_batch.tokens(made["batch"]), run)
    return Plan(
        recipe,
        name,
        gpu,
        ranks,
        efficiency,
        result,
        largest,
        at_hand,
        plan_batch.tokens(made["batch"]),
        longest,
        made["media"],
        plan_batch.is_measured(made["batch"]),
    )


def _automatic(recipe: Recipe, gpu: Gpu, without: Simulation) -> int:
    """How many chunks `retain: auto` would keep."""
    bound = recipe.retain_mib * 2**20 if recipe.retain_mib is not None else 0.8 * max(0, usable(gpu) - without.peak)
    return min(without.chunks, int(bound // max(1, without.largest[0])))


def _largest_chunk(recipe: Recipe, gpu: Gpu, result: Simulation, longest: int, tokens: int, run) -> int:
    """The largest chunk budget that was tried and fits: guesses by the bytes of a token, then between what fits and what does not."""
    limit, (size, in_chunk) = usable(gpu), result.largest
    low = (min(recipe.chunk_tokens, tokens), result.peak) if result.peak <= limit else (0, result.peak - size)
    high, slope = None, size / max(1, in_chunk)
    for _ in range(_TRIALS):
        budget = int(low[0] + (limit - low[1]) / slope) // _STEP * _STEP
        budget = min(max(budget, longest), tokens if high is None else high[0] - _STEP)
        if budget < longest or budget <= low[0] * _NEAR:
            break
        trial = run(replace(recipe, chunk_tokens=budget), 2)
        low, high = ((budget, trial.peak), high) if trial.peak <= limit else (low, (budget, trial.peak))
        slope = trial.largest[0] / max(1, trial.largest[1]) if high is None else max(1.0, (high[1] - low[1]) / (high[0] - low[0]))
    return low[0] if low[0] >= longest else 0
