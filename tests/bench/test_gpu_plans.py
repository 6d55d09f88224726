"""The plans that `python -m bench gpu` carries to a GPU are those of the recipes as they are now."""

import pytest
import torch

from bench.gpu import plans
from train.build import trained_parameters
from train.plan import batch as plan_batch
from train.plan.fake import model as plan_model


@pytest.mark.parametrize("name", plans.PLANNED)
def test_the_batch_and_the_weights_are_those_of_the_plan(name):
    plan, recipe = plans.read(name), plans.PLANNED[name].loaded()
    model = plan_model.model_of_config(recipe, torch.device("meta"))
    assert trained_parameters(model) == (plan["trained"], plan["weights"])
    assert plan_batch.tokens(plan_batch.assumed_batch(recipe, model.processing, 1)) == plan["tokens"]


@pytest.mark.slow
def test_the_plan_is_what_is_planned_now():
    """Else: python -m bench.gpu.plans"""
    now = plans.numbers(plans.PLANNED["100m"].loaded(), "100m")
    plan = plans.read("100m")
    for key in ("chunks", "tokens", "trained", "weights"):
        assert now[key] == plan[key], key
    # 2 %: releases of torch differ in what an operator keeps
    for key in ("peak", "flops"):
        assert now[key] == pytest.approx(plan[key], rel=0.02), key
    assert now["seconds"] == pytest.approx(plan["seconds"], rel=0.02)


def test_random_weights_are_made_where_they_are_asked_for():
    recipe = plans.PLANNED["100m"].loaded()
    model = plan_model.model_of_config(recipe, torch.device("cpu"))
    weights = [p for p in model.parameters() if p.ndim == 2]
    assert all(p.device.type == "cpu" and p.dtype == torch.bfloat16 for p in model.parameters() if not p.requires_grad)
    assert all(bool(p.isfinite().all()) for p in weights) and sum(bool(p.abs().max() > 0) for p in weights) > 100
