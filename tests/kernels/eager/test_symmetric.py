"""`symmetric` from shared logits: the square batches that take that way, against the dense definition in float64."""

import pytest

from contrastive_kernels import info_nce_value_and_grad
from contrastive_kernels.eager import sweep as panels
from contrastive_kernels.eager import symmetric
from tests.kernels.helpers import products
from tests.kernels.helpers.definition import close, equals_the_definition
from tests.kernels.helpers.sampling import Case

N = 13
SHARED = [
    (),
    ("target_ids",),
    ("hardness",),
    ("weight",),
    ("hard",),
    ("packed_hard",),
    ("learnt_temperature",),
    ("normalize",),
    ("matryoshka",),
    ("sum",),
    ("none",),
    ("small_workspace",),
    ("hard", "hardness", "target_ids", "weight", "learnt_temperature"),
]
APART = [("positives",), ("query_mask",), ("margin",), ("query_negatives",), ("smoothing",), ("cold",)]


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(panels, "TILE_COLUMNS", 5)
    made, real = [], symmetric.sweep
    monkeypatch.setattr(symmetric, "sweep", lambda *arguments: made.append(1) or real(*arguments))
    return made


@pytest.mark.parametrize("way", products.WAYS)
@pytest.mark.parametrize("names", SHARED + APART)
def test_equals_the_definition(names, way, calls, monkeypatch):
    products.force(monkeypatch, way)
    case = Case(4, N, N)
    options = {**case.options(names), "symmetric": True}
    equals_the_definition(case, options, 1e-11)
    assert bool(calls) == (names in SHARED)


def test_one_gradient_alone(calls):
    case = Case(5, N, N)
    both = info_nce_value_and_grad(case.query, case.target, temperature=0.2, symmetric=True)
    for name in ("query", "target"):
        alone = info_nce_value_and_grad(case.query, case.target, temperature=0.2, symmetric=True, wrt=(name,))
        close(getattr(alone, f"d_{name}"), getattr(both, f"d_{name}"), name, atol=1e-15)
    assert len(calls) == 3
