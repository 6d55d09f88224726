"""Which rows make up which step: a pure function of (seed, step), whatever the number of workers, ranks or restarts.

Global batch B, block size b with b dividing B. Step s has B/b blocks; block g = s * B/b + k draws its source, among those
that have begun by step s, from the weights by a hash of (seed, g), then takes that source's next b rows from its stream of
permutations, one permutation an epoch. Rank r takes the r-th contiguous slice of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

Row = tuple[int, int]  # (source, row of the source)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _hash_uniform(seed: int, counters: np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) for each counter, by SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed % 2**64) * np.uint64(0xD1342543DE82EF95) + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / 2**53


@lru_cache(maxsize=64)
def _permutation(seed: int, source: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, source, epoch]))).permutation(size)


class BlockSampler:
    """Batch sampler over several sources; usable as `DataLoader(batch_sampler=...)`.

    Args:
        sizes: rows of each source, each at least 1.
        weights: positive weight of each source; normalised to the probability of drawing the next block from it.
        global_batch: rows of a step over all ranks.
        block: rows drawn from one source in a row (`interleave_batch_size`); divides `global_batch`.
        steps: length of the run in steps.
        seed: any integer.
        from_step: step (from 0) at which each source joins the mixture; None: all from the start.
        rank, world_size: this process's slice of every batch; `world_size` divides `global_batch`.

    Raises:
        ValueError: where sizes do not divide or a source is empty, with the mend.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        global_batch: int,
        block: int,
        steps: int,
        seed: int,
        from_step: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        if len(sizes) != len(weights) or not sizes:
            raise ValueError(f"expected one weight per source and at least one source, got {len(weights)} weights for {len(sizes)}")
        if min(sizes) < 1:
            raise ValueError(f"source {list(sizes).index(min(sizes))} has no rows; leave it out of the recipe")
        if min(weights) <= 0:
            raise ValueError(f"weights must be positive, got {min(weights)}; leave a source out instead of weighing it 0")
        begins = np.zeros(len(sizes), dtype=np.int64) if from_step is None else np.asarray(from_step, dtype=np.int64)
        if begins.shape != (len(sizes),) or begins.min() != 0:
            raise ValueError(f"from_step must hold one step a source, 0 for at least one of them, got {begins.tolist()}")
        if block < 1 or global_batch % block:
            raise ValueError(f"interleave_batch_size ({block}) must divide global_batch ({global_batch})")
        if global_batch % world_size:
            raise ValueError(f"global_batch ({global_batch}) must be divisible by the number of ranks ({world_size})")
        self.sizes, self.global_batch, self.block, self.steps, self.seed = list(sizes), global_batch, block, steps, seed
        self.rank, self.world_size = rank, world_size
        per_step = global_batch // block
        uniform = _hash_uniform(seed, np.arange(steps * per_step))
        self._source = np.zeros(len(uniform), dtype=np.int64)
        for start in np.unique(begins):
            weighed = np.where(begins <= start, np.asarray(weights, dtype=np.float64), 0.0)
            stage = slice(int(start) * per_step, None)
            drawn = np.searchsorted(np.cumsum(weighed) / weighed.sum(), uniform[stage], side="right")
            # Rounding may leave the last bound a hair below 1.
            self._source[stage] = np.minimum(drawn, np.flatnonzero(weighed)[-1])
        # How many earlier blocks drew the same source: where in the source's stream this block begins.
        self._turn = np.zeros(len(uniform), dtype=np.int64)
        for source in range(len(sizes)):
            drawn = self._source == source
            self._turn[drawn] = np.arange(int(drawn.sum()))

    def __len__(self) -> int:
        return self.steps

    def batch(self, step: int) -> list[Row]:
        """All rows of the global batch of `step`, in order."""
        per_step = self.global_batch // self.block
        rows: list[Row] = []
        for g in range(step * per_step, (step + 1) * per_step):
            source = int(self._source[g])
            start = int(self._turn[g]) * self.block
            rows += [(source, self._row(source, position)) for position in range(start, start + self.block)]
        return rows

    def _row(self, source: int, position: int) -> int:
        epoch, place = divmod(position, self.sizes[source])
        return int(_permutation(self.seed, source, epoch, self.sizes[source])[place])

    def __iter__(self) -> Iterator[list[Row]]:
        share = self.global_batch // self.world_size
        for step in range(self.steps):
            yield self.batch(step)[self.rank * share : (self.rank + 1) * share]
