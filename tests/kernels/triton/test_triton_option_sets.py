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


@pytest.fixture
def ways(monkeypatch):
    """`ways.turn` says which of the ways that a problem can take it takes; returns what was taken."""

    class Ways:
        turn, taken = 0, set()

    def taking(plan_of):
        def taken(*args):
            plan = plan_of(*args)
            if plan is None:
                return None
            possible = [way for way in plan.ways if not way.reason]
            way = possible[Ways.turn % len(possible)]
            Ways.taken.add(way.path)
            return dataclasses.replace(plan, chosen=way)

        return taken

    monkeypatch.setattr(sweep, "plan_for", taking(sweep.plan_for))
    monkeypatch.setattr(symmetric, "decide", taking(symmetric.decide))
    monkeypatch.setattr(levels, "plan", taking(levels.plan))
    return Ways


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


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the unsafe shift of the first launch, done again
@pytest.mark.parametrize("sets", [[(name,) for name in NAMES], random_sets(24, seed=3)], ids=["alone", "together"])
def test_against_the_definition(sets, ways, monkeypatch):
    monkeypatch.setattr("test_options.info_nce", with_kernels)
    for seed, names in enumerate(sets):
        ways.turn = seed
        try:
            agree(names, seed)
        except Exception as error:
            raise AssertionError(f"options {names}, seed {seed}, ways {ways.taken}") from error
    assert ways.taken >= {"exp", "chunk", "fused"}


VECTORS = ("positives", "target_ids", "query_mask", "target_mask", "own_negatives_only", "packed_hard", "weight")


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("way", range(3))
@pytest.mark.parametrize("more", [(), ("symmetric", "normalize"), ("matryoshka",)], ids=["alone", "both", "levels"])
def test_vectors_that_are_not_contiguous(more, way, ways, monkeypatch):
    monkeypatch.setattr("test_options.info_nce", with_strided_vectors)
    ways.turn = way
    for seed, names in enumerate(
        [*((name,) for name in VECTORS), ("query_negatives", "query_ids"), (*VECTORS, "query_negatives", "query_ids")]
    ):
        try:
            agree(names + more, seed)
        except Exception as error:
            raise AssertionError(f"{names + more}, ways {ways.taken}") from error
