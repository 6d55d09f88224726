"""Bytes that an optimizer keeps: as they are counted before a run, and as a plan's stand-in holds them after a step."""

import pytest
import torch

from train.optimizers import planned_optimizer, state_bytes
from train.recipe.schema import Recipe


def held(optimizer) -> int:
    """Bytes of state but for step counters."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.dim())


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "sgd"])
@pytest.mark.parametrize(
    "count", [10, 4095, 4096, 5000], ids=lambda n: f"{n} weights"
)  # either side of what stays in float32; a part of a block
def test_what_is_counted_is_what_is_held(name, count):
    recipe = Recipe.__new__(Recipe)
    recipe.optimizer, recipe.learning_rate, recipe.weight_decay = name, 1e-3, 0.0
    parameter = torch.nn.Parameter(torch.zeros(count))
    parameter.grad = torch.zeros(count)
    optimizer = planned_optimizer(recipe, [parameter], on_gpu=False)
    optimizer.step()
    assert held(optimizer) == state_bytes(name, count, 4)


def test_paged_state_can_leave_the_device():
    assert state_bytes("paged_adamw_8bit", 10**6, 4) == 0 < state_bytes("adamw_8bit", 10**6, 4)
