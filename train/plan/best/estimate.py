"""Peak and time of a step with any chunks, put together from what sampled ones took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from contrastive_kernels.gradcache.chunking import token_budget_chunks

from ..chunks import Outline, interpolated
from ..gpus import Gpu
from ..pieces import Piece
from ..search import link_seconds
from ..simulate import Simulation

_NEAR = 0.2  # how fast a piece of another size counts less: a factor of e in size halves its weight five times over


@dataclass(frozen=True)
class Estimated:
    """Of a step whose last `kept` of `chunks` chunks keep their graph: bytes at most, and seconds.

    `full`: bytes at most if all that keep theirs were filled up to the budget, as a larger batch's are.
    """

    chunks: int
    kept: int
    peak: float
    seconds: float
    full: float = 0.0


class Estimator:
    """Steps of one way to train (`setting.Way`).

    Args:
        sample: a sampled step of it (`Planner.run(..., is_sample=True)`). keep_mib: bound on features of a frozen tower.
        feature_width: bytes of these per image token.
    """

    def __init__(self, sample: Simulation, gpu: Gpu, keep_mib: float):
        self.sample, self.gpu, self.room = sample, gpu, keep_mib * 2**20
        self.pieces: list[Piece] = [*sample.pieces]
        pictured = [p.outline for p in sample.pieces if p.outline.image_tokens]
        self.feature_width = max((o.features / o.image_tokens for o in pictured), default=0.0)
        self.raised = 1.0  # by what peaks turned out higher than they were put together

    def learn(self, simulated: Simulation, estimated: Estimated) -> None:
        """Takes in a step that was simulated as it is, and was estimated before."""
        self.pieces += [piece for piece in simulated.pieces if piece not in self.pieces]
        self.raised = max(self.raised, simulated.peak / estimated.peak)

    def curve(self, chunk_tokens: int) -> Curve:
        """Steps with chunks of this budget, by how many keep their graph."""
        rows: list[tuple[int, ...]] = []
        for side in self.sample.shapes:
            for chunk in token_budget_chunks([tokens for tokens, *_ in side], chunk_tokens):
                rows.append((*(sum(side[row][i] for row in chunk) for i in range(3)), len(chunk)))
        outlines = [Outline((), 0, *row) for row in rows]
        vectors = np.array([outline.vector() for outline in outlines], dtype=float)
        features = np.array([outline.image_tokens for outline in outlines]) * self.feature_width
        features[np.cumsum(features) > self.room] = 0  # as `FeatureStore` takes them, to a chunk
        of = {kept: self._pieces(kept, chunk_tokens) for kept in (False, True)}

        def every(what: str, kept: bool) -> np.ndarray:
            pieces, weights = of[kept]
            values = np.array([_value(piece, what) for piece in pieces], dtype=float)
            known = np.array([piece.outline.vector() for piece in pieces], dtype=float)
            return interpolated(known, values, vectors, weights)

        return Curve(
            self, chunk_tokens, vectors[:, 0], features, {(what, kept): every(what, kept) for what in _QUANTITIES for kept in (False, True)}
        )

    def _pieces(self, kept: bool, chunk_tokens: int) -> tuple[list[Piece], np.ndarray]:
        """Pieces that do not differ in what they keep, and how much each counts for chunks of this size."""
        alike = [p for p in self.pieces if p.outline.kind[0] == kept and not p.is_apart and not p.outline.kind[1]]
        alike = alike or [p for p in self.pieces if p.outline.kind[0] == kept] or self.pieces
        distances = [abs(np.log(max(1, p.outline.tokens) / chunk_tokens)) for p in alike]
        return alike, np.array([_NEAR / (_NEAR + distance) for distance in distances]) ** 2


_QUANTITIES = ("first", "second", "graph", "rise", "high")


def _value(piece: Piece, what: str) -> float:
    value = getattr(piece, what)
    return value if isinstance(value, int) else value.seconds


class Curve:
    """Steps of one chunk budget.

    Args:
        budget: tokens of a chunk at most. tokens: of each. features: bytes of a frozen tower's output that each keeps.
        taken: what each chunk takes, (chunks,) by quantity of a `Piece` and whether its graph is kept.
    """

    def __init__(
        self, estimator: Estimator, budget: int, tokens: np.ndarray, features: np.ndarray, taken: dict[tuple[str, bool], np.ndarray]
    ):
        self.estimator, self.budget, self.tokens, self.features, self.taken = estimator, budget, tokens, features, taken
        self.chunks = len(features)

    def at(self, kept: int) -> Estimated:
        """The step whose last `kept` chunks keep their graph."""
        frame, count = self.estimator.sample.frame, self.chunks
        keeps = np.arange(count) >= count - kept
        graphs = np.where(keeps, self.taken["graph", True], 0)
        left = graphs + self.features
        first = frame.first + np.cumsum(left) + self._chosen("rise", keeps)
        order = np.concatenate([np.flatnonzero(keeps), np.flatnonzero(~keeps)])  # as the second pass takes them
        there = left.sum() - np.concatenate([[0], np.cumsum(left[order])[:-1]])
        before = np.where(np.arange(count) == 0, frame.first, frame.second)  # the first one finds no gradients
        second = before + there + self._chosen("high", keeps)[order]
        peak = max(first.max(), frame.loss + left.sum(), second.max(), frame.after)
        seconds = frame.cost.seconds + self._chosen("first", keeps).sum() + self._chosen("second", keeps).sum()
        seconds += link_seconds(self.estimator.sample, self.estimator.gpu, count, kept)
        filled = kept * self.budget - self.tokens[keeps].sum()
        densest = (self.taken["graph", True] / self.tokens).max()
        raised = self.estimator.raised
        return Estimated(count, kept, raised * peak, seconds, raised * (peak + max(0.0, filled) * densest))

    def most_that_fit(self, limit: float) -> Estimated | None:
        """The fastest one of at most `limit` bytes: with as many graphs kept as fit. None: not even without any."""
        if self.at(self.chunks).peak <= limit:
            return self.at(self.chunks)
        low, high = (0, self.chunks) if self.at(0).peak <= limit else (-1, 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.at(middle).peak <= limit else (low, middle)
        return self.at(low) if low >= 0 else None

    def _chosen(self, what: str, keeps: np.ndarray) -> np.ndarray:
        return np.where(keeps, self.taken[what, True], self.taken[what, False])


def budgets(shapes: Sequence[Sequence[tuple[int, int, int]]], longest: int, own: int | None) -> list[int]:
    """Chunk budgets to look at: from the longest sample to a whole side of the batch, each half as large again as the one before.

    Args:
        shapes: of a `Simulation`. own: the recipe's, which is looked at too.
    """
    whole = max(sum(tokens for tokens, *_ in side) for side in shapes)
    found, budget = {_rounded(whole), min(own or whole, _rounded(whole))}, float(longest)
    while budget < whole:
        found.add(_rounded(budget))
        budget *= 2**0.5
    return sorted(budget for budget in found if longest <= budget)


def _rounded(tokens: float) -> int:
    step = 256 if tokens >= 1024 else 16
    return int(-(-tokens // step) * step)
