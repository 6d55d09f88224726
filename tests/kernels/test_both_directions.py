"""`symmetric` from shared logits: the square batches that take that way, against the dense definition in float64."""

import pytest
import torch
from sampling import Case
from test_options import NAMES, close, leaves

from contrastive_kernels import both_directions, info_nce, info_nce_value_and_grad, panels
from contrastive_kernels.reference import info_nce_reference

N = 13
SHARED = [(), ("target_ids",), ("hardness",), ("weight",), ("hard",), ("packed_hard",), ("learnt_temperature",), ("normalize",), ("matryoshka",), ("sum",), ("none",), ("small_workspace",), ("hard", "hardness", "target_ids", "weight", "learnt_temperature")]
APART = [("positives",), ("query_mask",), ("margin",), ("query_negatives",), ("smoothing",), ("cold",)]


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(panels, "TILE_COLUMNS", 5)
    made, real = [], both_directions._both
    monkeypatch.setattr(both_directions, "_both", lambda *arguments: made.append(1) or real(*arguments))
    return made


@pytest.mark.parametrize("names", SHARED + APART)
def test_equals_the_definition(names, calls):
    case = Case(4, N, N)
    options = {**case.options(names), "symmetric": True}
    cotangent = 0.5 + torch.rand(N, generator=case.generator, dtype=torch.float64)
    found = []
    for function in (info_nce, info_nce_reference):
        tensors, given = leaves(case, options)
        loss, stats = function(tensors["query"], tensors["target"], **given, return_stats=True)
        gradients = torch.autograd.grad((loss * cotangent[: loss.numel()].view(loss.shape)).sum(), list(tensors.values()))
        found.append((loss.detach(), dict(zip(tensors, gradients)), stats))
    (loss, gradients, stats), (true_loss, true_gradients, true_stats) = found
    assert bool(calls) == (names in SHARED)
    close(loss, true_loss, "loss")
    for name in true_gradients:
        assert name in NAMES
        close(gradients[name], torch.nan_to_num(true_gradients[name]), name)
    for field in vars(true_stats):
        close(getattr(stats, field), getattr(true_stats, field), field)


def test_one_gradient_alone(calls):
    case = Case(5, N, N)
    both = info_nce_value_and_grad(case.query, case.target, temperature=0.2, symmetric=True)
    for name in ("query", "target"):
        alone = info_nce_value_and_grad(case.query, case.target, temperature=0.2, symmetric=True, wrt=(name,))
        close(getattr(alone, f"d_{name}"), getattr(both, f"d_{name}"), name, atol=1e-15)
    assert len(calls) == 3
