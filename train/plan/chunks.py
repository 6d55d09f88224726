"""Which chunks of a planned step are run, and what the others take by them.

What a chunk keeps grows with its tokens, image tokens, patches and rows, each by so much, so that a few chunks that differ in
these say what any other keeps. How high it goes is the highest of several such sums, which interpolation would miss from
below: there the bound is that a chunk which is in no respect more than L times another takes at most L times as much.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

_ALIKE = 1e-3  # a chunk this near to what those that are run span needs no run of its own
_LOOSE = 1.01  # nor one whose bound is at most this much above it
_MARGIN = 1.003  # on what is interpolated: kernels pad, index tensors come and go


@dataclass(frozen=True)
class Outline:
    """A chunk before it is run.

    Attributes:
        kind: chunks of one kind do the same: keep their graph or not, keep the features of a frozen tower or not.
        turn: place in the second pass.
        features: bytes of a frozen tower's output that it keeps between the passes.
    """

    kind: tuple
    turn: int
    tokens: int
    image_tokens: int
    patches: int
    rows: int
    features: int = 0

    def vector(self) -> tuple[int, ...]:
        return self.tokens, self.image_tokens, self.patches, self.rows, int(self.image_tokens > 0), 1


def picked(outlines: Sequence[Outline], most: int, apart: Collection[int] = ()) -> list[int]:
    """Indices of the chunks to run: all of them up to `most`; else those `apart` and, of every kind, what says enough of the others."""
    if len(outlines) <= most:
        return list(range(len(outlines)))
    chosen = set(apart)
    kinds: dict[tuple, list[int]] = {}
    for index, outline in enumerate(outlines):
        if index not in chosen:
            kinds.setdefault(outline.kind, []).append(index)
    for members in kinds.values():
        vectors = _scaled([outlines[i].vector() for i in members])[0]
        spanning = _spanning(vectors, most)
        spanning += _bounding(vectors, spanning, most - len(spanning))
        chosen.update(members[i] for i in spanning)
    return sorted(chosen)


def _spanning(vectors: np.ndarray, most: int) -> list[int]:
    """The largest one first, then whatever differs most from those that were picked."""
    picked: list[int] = []
    left = vectors.copy()
    while len(picked) < most:
        lengths = np.linalg.norm(left, axis=1)
        furthest = int(lengths.argmax())
        if lengths[furthest] <= _ALIKE * np.linalg.norm(vectors[furthest]):
            break
        picked.append(furthest)
        direction = left[furthest] / lengths[furthest]
        left = left - np.outer(left @ direction, direction)
    return picked


def _bounding(vectors: np.ndarray, known: Sequence[int], most: int) -> list[int]:
    """Further ones, until no other's bound is loose where it could matter."""
    picked: list[int] = []
    sizes = vectors[:, :-1].sum(axis=1)
    while len(picked) < most:
        bounds = np.min([_times(vectors, vectors[i]) * sizes[i] for i in (*known, *picked)], axis=0)
        bounds[bounds <= _LOOSE * sizes[[*known, *picked]].max()] = 0  # a chunk that is run goes as high
        if not bounds.any():
            break
        picked.append(int(bounds.argmax()))
    return picked


def _times(vectors: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How many times `other` each one is in the respect in which it is most; at least once."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(vectors > 0, vectors / other, 0)
    return np.maximum(shares.max(axis=1), 1)


def _all_times(vector: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many times each of `others` one vector is in the respect in which it is most; at least once."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(vector > 0, vector / others, 0)
    return np.maximum(shares.max(axis=1), 1)


def _scaled(vectors: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    matrix = np.array(vectors, dtype=float)
    scale = np.maximum(np.abs(matrix).max(axis=0), 1)
    return matrix / scale, scale


def kept(known: dict[int, float], outlines: Sequence[Outline], wanted: Sequence[int]) -> list[float]:
    """What the `wanted` chunks keep, from what is `known` of others of their kind; a little more, never less than nothing."""
    vectors, scale = _scaled([outlines[i].vector() for i in known])
    solution, *_ = np.linalg.lstsq(vectors, np.array(list(known.values()), dtype=float), rcond=1e-9)
    return [_MARGIN * max(0.0, float(np.array(outlines[i].vector()) / scale @ solution)) for i in wanted]


def bounds(known: dict[int, float], outlines: Sequence[Outline], wanted: Sequence[int]) -> list[float]:
    """What the `wanted` chunks take at most, from what is `known` of others of their kind."""
    vectors = np.array([outlines[i].vector() for i in wanted], dtype=float)
    bounds = [_times(vectors, np.array(outlines[i].vector(), dtype=float)) * value for i, value in known.items()]
    return np.min(bounds, axis=0).tolist()


def fitted(known: dict[int, float], outlines: Sequence[Outline], wanted: Sequence[int]) -> list[float]:
    """What the `wanted` chunks take, from what is `known` of others, as sums: within what their sizes bound it by."""
    vectors = np.array([outlines[i].vector() for i in wanted], dtype=float)
    return interpolated(
        np.array([outlines[i].vector() for i in known], dtype=float), np.array([*known.values()], dtype=float), vectors
    ).tolist()


def interpolated(known: np.ndarray, values: np.ndarray, wanted: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(W,) what chunks take, by a sum over their sizes that goes through what is known of others.

    Args:
        known: (K, sizes) of `Outline.vector`. values: (K,) what they take. wanted: (W, sizes).
        weights: (K,) how much each of the known counts where no sum goes through all.
    """
    if len(wanted) == 0:
        return np.zeros(0)
    scale = np.maximum(np.abs(known).max(axis=0), 1)
    weights = np.ones(len(known)) if weights is None else weights
    solution, *_ = np.linalg.lstsq(known / scale * weights[:, None], values * weights, rcond=1e-7)
    with np.errstate(invalid="ignore"):  # nothing, times a size that the known one has none of: no bound
        most = np.nanmin(
            [np.full(len(wanted), np.inf), *(_times(wanted, v) * value for v, value in zip(known, values, strict=True))], axis=0
        )
    least = np.max([value / _all_times(vector, wanted) for vector, value in zip(known, values, strict=True)], axis=0)
    return np.clip(wanted / scale @ solution, np.minimum(least, most), most)


def nearest(outlines: Sequence[Outline], index: int, among: Sequence[int]) -> int:
    """The chunk that is most like another one, of its kind where there is one."""
    same = [i for i in among if outlines[i].kind == outlines[index].kind] or list(among)
    vectors = _scaled([outlines[i].vector() for i in (index, *same)])[0]
    return same[int(np.linalg.norm(vectors[1:] - vectors[0], axis=1).argmin())]
