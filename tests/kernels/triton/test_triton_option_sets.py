"""Every option alone and a sample of sets of them with the kernels, each way in turn, against the dense definition in float64."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels import info_nce
from contrastive_kernels.triton import matryoshka as levels
from contrastive_kernels.triton import sweep, symmetric
from tests.kernels.helpers.definition import agree
from tests.kernels.helpers.sampling import NAMES, random_sets

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float64 under the interpreter; bench/gpu checks a GPU")


class Ways:
    """Which of the ways that a problem can take it takes: the one of number `turn`, and those that were taken."""

    def __init__(self):
        self.turn, self.taken = 0, set()

    def choosing(self, plan_of):
        def choose(*args):
            plan = plan_of(*args)
            if plan is None:
                return None
            possible = [way for way in plan.ways if not way.reason]
            way = possible[self.turn % len(possible)]
            self.taken.add(way.path)
            return dataclasses.replace(plan, chosen=way)

        return choose


@pytest.fixture(scope="module")
def ways():
    """Every problem of this file takes the way of `ways.turn`."""
    ways = Ways()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "plan_for", ways.choosing(sweep.plan_for))
        patch.setattr(symmetric, "decide", ways.choosing(symmetric.decide))
        patch.setattr(levels, "plan", ways.choosing(levels.plan))
        yield ways


def with_kernels(query, target, **options):
    return info_nce(query, target, backend="triton", **options)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers two elements apart, others between them that would change the loss."""
    between = ~tensor if tensor.dtype == torch.bool else tensor.flip(0) + 1
    return torch.stack([tensor, between], dim=-1)[..., 0]


def with_strided_vectors(query, target, **options):
    vectors = {k: strided(v) for k, v in options.items() if isinstance(v, torch.Tensor) and v.dim() and not v.requires_grad and len(v) > 1}
    assert not any(v.is_contiguous() for v in vectors.values())
    return with_kernels(query, target, **options | vectors)


SETS = [(name,) for name in NAMES] + random_sets(24, seed=3)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the unsafe shift of the first launch, done again
@pytest.mark.parametrize("seed", range(len(SETS)), ids=["-".join(names) for names in SETS])
def test_against_the_definition(seed, ways):
    ways.turn = seed if seed < len(NAMES) else seed - len(NAMES)
    agree(SETS[seed], ways.turn, with_kernels)


def test_every_way_is_taken(ways):
    """A way is counted when a problem takes it: plain problems, so that it does not hang on which tests were selected."""
    for ways.turn in range(3):
        agree((), 0, with_kernels)
    assert ways.taken >= {"exp", "chunk", "fused"}


VECTORS = ("positives", "target_ids", "query_mask", "target_mask", "own_negatives_only", "packed_hard", "weight")
VECTOR_SETS = [
    *((name,) for name in VECTORS),
    ("query_negatives", "query_ids"),
    ("target_query_ids",),
    (*VECTORS, "query_negatives", "query_ids"),
]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("way", range(3))
@pytest.mark.parametrize("more", [(), ("symmetric", "normalize"), ("matryoshka",)], ids=["alone", "both", "levels"])
@pytest.mark.parametrize("seed", range(len(VECTOR_SETS)), ids=["-".join(names) for names in VECTOR_SETS])
def test_vectors_that_are_not_contiguous(seed, more, way, ways):
    ways.turn = way
    agree(VECTOR_SETS[seed] + more, seed, with_strided_vectors)
