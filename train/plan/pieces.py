"""What the chunks of a planned step took, one by one, and what the step takes around them: what other steps are put together from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from contrastive_kernels.gradcache.chunks import Chunk

from .chunks import Outline
from .meter import Cost

_LARGEST = 32_768  # tokens of a sampled chunk; beyond it all grows in proportion


@dataclass(frozen=True)
class Piece:
    """A chunk that was run.

    Attributes:
        outline: its sizes; `kind` says whether its graph was kept, and whether the frozen tower ran twice.
        first, second: cost of its turns in the two passes.
        graph: bytes of its kept graph. rise: what its first turn takes at most beyond what it leaves behind. high: what its second
            turn takes at most beyond what stood before.
        is_apart: it did something that others do not, such as making the gradients.
    """

    outline: Outline
    first: Cost
    second: Cost
    graph: int
    rise: int
    high: int
    is_apart: bool


@dataclass(frozen=True)
class Frame:
    """Bytes of a step without what its chunks take, and cost of all that is no chunk's.

    Attributes:
        first, loss, second: at most in the passes and between them. after: at most when they are over.
    """

    first: int
    loss: int
    second: int
    after: int
    cost: Cost


def sampled(chunks: Sequence[Chunk], lengths: Sequence[Sequence[int]], budget: int) -> list[Chunk]:
    """Chunks of several sizes in place of a step's: of each side long samples and short ones, each size twice.

    Args:
        chunks: of the step, sorted by length, which say the rows of every side. lengths: tokens of the rows, by side.
        budget: tokens of the longest sample.
    """
    made = []
    for side in sorted({chunk.side for chunk in chunks}):
        rows = [row for chunk in chunks if chunk.side == side and not chunk.is_dummy for row in chunk.rows]
        most = max(budget, min(sum(lengths[side]) // 2, _LARGEST))
        # Small ones at the ends: the first makes the gradients, the last may reduce them, and neither tells of others.
        for order, size in ((rows, most // 16), (rows, most), (rows[::-1], most // 4), (rows[::-1], most // 16)):
            taken, tokens = [], 0
            for row in order:
                if taken and tokens + lengths[side][row] > max(size, budget):
                    break
                taken.append(row)
                tokens += lengths[side][row]
            made += [Chunk(side, taken, tokens), Chunk(side, taken, tokens)]
    return made
