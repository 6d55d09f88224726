"""The search: every way to train is sampled once, steps are put together from that, and those that win are simulated as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ...optimizers import state_bytes
from ...recipe.schema import Recipe
from ..search import Plan, Planner, link_seconds, usable
from ..simulate import Simulation
from .estimate import Estimated, Estimator, budgets
from .setting import Setting, Way, ways

_ALIKE = 1.01  # settings within it of the fastest are as fast: the one that a larger batch suits best is taken
_SIMULATED = 8  # steps that are simulated as they are, at most
_MIB = 2**20


@dataclass(frozen=True)
class Candidate:
    """A setting, and what is predicted of its step, as `Estimated` has it. `is_simulated`: as it is, not put together of sampled chunks."""

    setting: Setting
    peak: float
    seconds: float
    chunks: int
    kept: int
    full: float
    is_simulated: bool = False


@dataclass
class Found:
    """What a search found.

    Attributes:
        own: the plan of the recipe as it is, whether it fits or not. best: of the fastest setting that fits; None where none does.
        setting: that of `best`. ranking: the best of each way and of its neighbours, fastest first.
        lacking: ways of which no setting fits, with the least bytes that one would take.
    """

    own: Plan
    best: Plan | None = None
    setting: Setting | None = None
    ranking: list[Candidate] = field(default_factory=list)
    lacking: dict[Way, float] = field(default_factory=dict)


def find_best(planner: Planner, limit: int | None = None) -> Found:
    """The fastest setting of the planner's recipe that takes at most `limit` bytes (default: what its card has).

    Raises:
        ValueError: the recipe has no rows to plan with, or contradicts itself.
    """
    limit = usable(planner.gpu) if limit is None else limit
    own = planner.automatic(planner.recipe)
    simulated = planner.run(own)
    found = Found(planner.plan(own, simulated))
    for keep_mib in (_enough(own, simulated), 0.0):
        search = _Search(planner, limit, simulated)
        search.sample(ways(own, planner.ranks, keep_mib))
        found.lacking.update(search.lacking)
        chosen = search.settle()
        if chosen is not None:
            found.setting, (candidate, best) = chosen.setting, (chosen, search.simulated[chosen.setting])
            found.best = planner.plan(candidate.setting.of(own), best)
            found.ranking = search.ranking(chosen)
            break
        if _features(simulated) == 0:
            break
    return found


def _features(simulated: Simulation) -> float:
    """Bytes of a frozen tower's output for a rank's batch."""
    outlines = [piece.outline for piece in simulated.pieces if piece.outline.image_tokens]
    width = max((outline.features / outline.image_tokens for outline in outlines), default=0.0)
    return width * sum(image_tokens for side in simulated.shapes for _, image_tokens, _ in side)


def _enough(recipe: Recipe, simulated: Simulation) -> float:
    """MiB that hold all features of a frozen tower; the recipe's own bound where it does."""
    needed = _features(simulated) / _MIB
    return recipe.keep_mib if needed <= recipe.keep_mib else 256.0 * math.ceil(needed / 256)


class _Search:
    def __init__(self, planner: Planner, limit: int, own: Simulation):
        self.planner, self.limit, self.own = planner, limit, own
        self.estimators: dict[Way, Estimator] = {}
        self.simulated: dict[Setting, Simulation] = {}
        self.lacking: dict[Way, float] = {}
        self._curves: dict[tuple[Way, int], tuple[int, object]] = {}

    def sample(self, all_ways: list[Way]) -> None:
        """Simulates each way's chunks; not one that computes twice what another fits without."""
        for way in all_ways:
            without = self.estimators.get(Way(False, way.distributed, way.keep_mib))
            if way.checkpoints and without is not None and self._keeps_all(without, way):
                continue
            if self._least(way) > self.limit:
                self.lacking[way] = self._least(way)
                continue
            sample = self.planner.run(way.of(self.planner.recipe), is_sample=True)
            self.estimators[way] = Estimator(sample, self.planner.gpu, way.keep_mib)
            if not self._of_way(way):
                self.lacking[way] = min(self._curve(way, budget).at(0).peak for budget in self._budgets(way))

    def _least(self, way: Way) -> float:
        """Bytes that stay for the whole run whatever the chunks, where that is known without a simulation: weights whole on every rank."""
        recipe = self.planner.recipe
        if way.distributed == "fsdp" or recipe.quantization:
            return 0.0
        item = getattr(torch, recipe.dtype).itemsize
        state = state_bytes(recipe.optimizer, self.own.trained, item)
        return self.own.weights * item + self.own.trained * item + state

    def _keeps_all(self, estimator: Estimator, way: Way) -> bool:
        return any(c.kept == c.chunks for c in self._of_way(Way(False, way.distributed, way.keep_mib)))

    def _budgets(self, way: Way) -> list[int]:
        return budgets(self.estimators[way].sample.shapes, self.planner.least_budget, self.planner.recipe.chunk_tokens)

    def _curve(self, way: Way, budget: int):
        estimator = self.estimators[way]
        known = self._curves.get((way, budget))
        if known is None or known[0] != len(estimator.pieces):
            known = self._curves[way, budget] = len(estimator.pieces), estimator.curve(budget)
        return known[1]

    def _of_way(self, way: Way) -> list[Candidate]:
        """The fastest setting of each chunk budget that fits."""
        made = []
        for budget in self._budgets(way):
            estimated = self._curve(way, budget).most_that_fit(self.limit)
            while estimated is not None:
                candidate = self._candidate(way, budget, estimated)
                if candidate.peak <= self.limit:
                    made.append(candidate)
                    break
                if estimated.kept == 0:
                    break
                estimated = self._curve(way, budget).at(estimated.kept - 1)  # what was simulated did not fit
        return made

    def _candidate(self, way: Way, budget: int, estimated: Estimated) -> Candidate:
        setting = Setting(way, budget, estimated.kept)
        known = self.simulated.get(setting)
        if known is None:
            return Candidate(setting, estimated.peak, estimated.seconds, estimated.chunks, estimated.kept, estimated.full)
        seconds = known.cost.seconds + link_seconds(known, self.planner.gpu, known.chunks, known.kept)
        full = known.peak + estimated.full - estimated.peak
        return Candidate(setting, known.peak, seconds, known.chunks, known.kept, full, is_simulated=True)

    def candidates(self) -> list[Candidate]:
        return sorted((c for way in self.estimators for c in self._of_way(way)), key=lambda c: c.seconds)

    def settle(self) -> Candidate | None:
        """Simulates what is estimated to be best until that which was simulated is; None where nothing fits."""
        for _ in range(_SIMULATED):
            candidates = self.candidates()
            if not candidates:
                return None
            chosen = min((c for c in candidates if c.seconds <= _ALIKE * candidates[0].seconds), key=lambda c: c.full)
            if chosen.is_simulated:
                return chosen
            simulated = self.planner.run(chosen.setting.of(self.planner.recipe))
            self.simulated[chosen.setting] = simulated
            self.estimators[chosen.setting.way].learn(simulated, Estimated(chosen.chunks, chosen.kept, chosen.peak, chosen.seconds))
        return min((c for c in self.candidates() if c.is_simulated), key=lambda c: c.seconds, default=None)

    def ranking(self, chosen: Candidate) -> list[Candidate]:
        """The fastest of each way, and the budgets next to the chosen one."""
        budgets_of_way = self._budgets(chosen.setting.way)
        at = budgets_of_way.index(chosen.setting.chunk_tokens)
        near = budgets_of_way[max(0, at - 2) : at + 3]
        every = self.candidates()
        kept = [c for c in every if c.setting.way == chosen.setting.way and c.setting.chunk_tokens in near]
        for way in self.estimators:
            kept += [c for c in every if c.setting.way == way][:1]
        return sorted({c.setting: c for c in kept}.values(), key=lambda c: c.seconds)
