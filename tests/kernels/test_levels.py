"""Matryoshka levels from one sweep of plain torch: what takes that way, against the dense definition in float64."""

import pytest
from sampling import Case
from test_options import close, equals_the_definition

from contrastive_kernels import info_nce, levels, panels
from contrastive_kernels.reference import info_nce_reference

TOGETHER = [
    (), ("positives",), ("target_ids",), ("query_mask", "target_mask"), ("own_negatives_only",), ("margin",), ("hardness",), ("learnt_temperature",),
    ("weight",), ("sum",), ("none",), ("none", "weight", "positives"), ("small_workspace",), ("relative", "target_ids", "positives", "learnt_temperature"),
]
APART = [("symmetric",), ("query_negatives",), ("target_negatives",), ("smoothing",), ("hard",), ("cold",)]
DIMS = [{"matryoshka_dims": (3, 8), "matryoshka_weights": (0.7, 1.3)}, {"matryoshka_dims": (5, 1, 7, 2)}, {"matryoshka_dims": (4,), "matryoshka_weights": (0.5,)}]


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(panels, "TILE_COLUMNS", 5)
    made, real = [], levels.compute
    monkeypatch.setattr(levels, "compute", lambda *arguments: made.append(1) or real(*arguments))
    return made


@pytest.mark.parametrize("names", TOGETHER + APART)
@pytest.mark.parametrize("dims", DIMS)
def test_equals_the_definition(dims, names, calls):
    case = Case(8, 11, 22)
    case.target = case.target * 2
    options = {**case.options(names), **dims}
    if "small_workspace" in names:
        options["workspace_mib"] = 0.02
    equals_the_definition(case, options, 1e-10)
    assert bool(calls) == (names in TOGETHER)


def test_a_prefix_of_zeros_goes_level_by_level(calls):
    case = Case(9, 6, 6)
    case.query[2, :3] = 0
    result = [f(case.query, case.target, temperature=0.2, matryoshka_dims=(3, 8)) for f in (info_nce, info_nce_reference)]
    assert not calls
    close(*result, "loss")
