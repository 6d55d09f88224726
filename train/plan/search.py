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
        return link_seconds(self.simulation, self.gpu, self.simulation.chunks, self.simulation.kept)

    @property
    def step_seconds(self) -> float:
        return self.simulation.cost.seconds + self.link_seconds


def usable(gpu: Gpu) -> int:
    return int((gpu.gib - CONTEXT_GIB) * (1 - FRAGMENTATION) * _GIB)


def link_seconds(simulation: Simulation, gpu: Gpu, chunks: int, kept: int) -> float:
    """Collectives of a step of so many chunks, `kept` of which keep their graph: gathers of sharded weights in each pass over a chunk, and
    one reduction of the gradients; not hidden."""
    return ((3 * chunks - kept) * simulation.gathered + simulation.reduced) / (gpu.link_gb_s * 1e9)


class Planner:
    """Simulates steps of a recipe, and of others that spend memory in other ways, over one batch.

    Args:
        efficiency: share of the GPU's data sheet that matrix products reach; None: what its large products are known to reach.

    Raises:
        ValueError: the recipe contradicts itself, or has no rows to plan with.
    """

    def __init__(self, recipe: Recipe, gpu: Gpu, ranks: int = 1, *, name: str = "", efficiency: float | None = None):
        recipe.check_ranks(ranks)
        place = plan_batch.absent(recipe)
        self.at_hand = place is None
        if not self.at_hand and recipe.plan is None:
            raise ValueError(f"the data ({place}) is not here; say in `plan.rows` what a batch looks like, or copy the data")
        self.recipe, self.gpu, self.ranks, self.name = recipe, gpu, ranks, name
        self.efficiency = gpu.reached if efficiency is None else efficiency
        self._batch: dict[str, Any] | None = None
        self._media, self._possible = (0, 0), 0
        self._outer: dict[tuple[bool, str], int | None] = {}
        self._samples: dict[tuple[bool, str, float], Simulation] = {}

    def _make_batch(self, processing: Any) -> dict[str, Any]:
        if self._batch is None:
            make = plan_batch.first_batch if self.at_hand else plan_batch.assumed_batch
            self._batch = make(self.recipe, processing, self.ranks)
            self._media = plan_batch.decoded_total(processing, self._batch)
            self._possible = 0 if self.at_hand else plan_batch.longest_possible(self.recipe, processing)
        return self._batch

    def run(self, changed: Recipe, most_chunks: int = 8, *, is_sample: bool = False) -> Simulation:
        """A step of `changed`, which differs from the planner's recipe in nothing that rows depend on.

        A sampled one does not depend on the chunks of `changed`: it is run once for all that run a chunk in its way.
        """
        way = changed.gradient_checkpointing, changed.distributed, changed.keep_mib
        if is_sample and way in self._samples:
            return self._samples[way]
        simulation = simulate(
            changed,
            None,
            ranks=self.ranks,
            outer=self._outer.get((changed.gradient_checkpointing, changed.distributed), 1),
            make_batch=self._make_batch,
            most_chunks=most_chunks,
            is_sample=is_sample,
            flop_rate=self.gpu.tflops * 1e12 * self.efficiency,
            byte_rate=self.gpu.tb_s * 1e12 * self.gpu.reached_bandwidth,
            dispatch=self.gpu.dispatch,
        )
        self._outer[changed.gradient_checkpointing, changed.distributed] = simulation.outer
        if is_sample:
            self._samples[way] = simulation
        return simulation

    def automatic(self, recipe: Recipe) -> Recipe:
        """With a number of chunks in place of `retain: auto`."""
        if recipe.retain != "auto":
            return recipe
        return replace(recipe, retain=_automatic(recipe, self.gpu, self.run(replace(recipe, retain=0))))

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, once a step was simulated."""
        return plan_batch.longest(self._batch)

    @property
    def least_budget(self) -> int:
        """Tokens that a chunk has to hold: those of the longest sample, or of one whose pictures are as large as the model takes."""
        return max(self.longest, self._possible)

    def require_longest_fits(self, recipe: Recipe) -> None:
        """Raises ValueError where a sample is longer than the recipe's chunk budget."""
        if recipe.chunk_rows is None and recipe.chunk_tokens < self.longest:
            raise ValueError(
                f"chunk_tokens ({recipe.chunk_tokens}) is below the longest sample ({self.longest} tokens); "
                "raise it, or lower the image limits in model_options"
            )

    def largest_chunk(self, recipe: Recipe, simulation: Simulation) -> int | None:
        """The largest chunk budget that fits; None where chunks are of rows, or kept graphs take what there is (`--best` weighs both)."""
        if recipe.chunk_rows or simulation.kept:
            return None
        return _largest_chunk(recipe, self.gpu, simulation, self.longest, plan_batch.tokens(self._batch), self.run)

    def plan(self, recipe: Recipe, simulation: Simulation, largest_chunk: int | None = None) -> Plan:
        """What follows from a simulated step of `recipe`."""
        return Plan(
            recipe,
            self.name,
            self.gpu,
            self.ranks,
            self.efficiency,
            simulation,
            largest_chunk,
            self.at_hand,
            plan_batch.tokens(self._batch),
            self.longest,
            self._media,
            plan_batch.is_measured(self._batch),
        )


def make_plan(recipe: Recipe, gpu: Gpu, ranks: int = 1, *, name: str = "", efficiency: float | None = None) -> Plan:
    """Simulates a step, and another one with the largest chunk budget that should fit, where no graph is kept.

    Args:
        efficiency: as of a `Planner`.

    Raises:
        ValueError: the recipe contradicts itself, has no rows to plan with, or a sample is longer than its chunk budget.
    """
    planner = Planner(recipe, gpu, ranks, name=name, efficiency=efficiency)
    chosen = planner.automatic(recipe)
    result = planner.run(chosen)
    planner.require_longest_fits(recipe)
    return planner.plan(recipe, result, planner.largest_chunk(chosen, result))


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
