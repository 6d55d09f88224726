"""Matryoshka levels from one sweep of plain torch: what takes that way, against the dense definition in float64."""

import pytest
import torch
from sampling import Case
from test_options import close, leaves

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
    cotangent = 0.5 + torch.rand(11, generator=case.generator, dtype=torch.float64)
    found = []
    for function in (info_nce, info_nce_reference):
        tensors, given = leaves(case, options)
        loss, stats = function(tensors["query"], tensors["target"], **given, return_stats=True)
        gradients = torch.autograd.grad((loss * cotangent[: loss.numel()].view(loss.shape)).sum(), list(tensors.values()))
        found.append((loss.detach(), dict(zip(tensors, gradients)), stats))
    (loss, gradients, stats), (true_loss, true_gradients, true_stats) = found
    assert bool(calls) == (names in TOGETHER)
    close(loss, true_loss, "loss")
    for name in true_gradients:
        close(gradients[name], torch.nan_to_num(true_gradients[name]), name, 1e-10)
    for field in vars(true_stats):
        close(getattr(stats, field), getattr(true_stats, field), field)


def test_a_prefix_of_zeros_goes_level_by_level(calls):
    case = Case(9, 6, 6)
    case.query[2, :3] = 0
    result = [f(case.query, case.target, temperature=0.2, matryoshka_dims=(3, 8)) for f in (info_nce, info_nce_reference)]
    assert not calls
    close(*result, "loss")
