"""What optimizers keep: bytes of their state, counted before a run, and stand-ins of the same bytes for a plan.

The one home of these facts; a test holds the count against what the stand-ins hold.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .recipe.schema import Recipe

# Numbers kept for each weight, by a part of the optimizer's name; the first that fits counts. Those not named keep little.
_STATES = {"ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "adam": 2}
_BLOCK, _SMALL = 256, 4096  # bitsandbytes' own: weights that share a float32 scale, and those below which state stays in float32


def state_bytes(optimizer: str, count: int, item: int) -> int:
    """Bytes of an optimizer's state for one parameter that stay on the device.

    Args:
        count: weights of the parameter. item: bytes of one.
    """
    if "paged" in optimizer:  # moves to the host where the device is full
        return 0
    states = next((states for part, states in _STATES.items() if part in optimizer), 0)
    if "8bit" not in optimizer:
        return states * count * item
    return states * (4 * count if count < _SMALL else count + 4 * -(-count // _BLOCK))


def planned_optimizer(recipe: Recipe, parameters: list[nn.Parameter], on_gpu: bool) -> torch.optim.Optimizer:
    """The recipe's optimizer, or one of the same bytes.

    Raises:
        ValueError: an optimizer whose state is not known here.
    """
    name, rate = recipe.optimizer, recipe.learning_rate
    if "8bit" in name and "adamw" in name:
        return EightBitAdam(parameters, {"lr": rate})
    if name in ("adamw_torch", "adamw_torch_fused", "paged_adamw", "paged_adamw_32bit", "adamw_bnb_32bit"):
        fused = name == "adamw_torch_fused" or "torch" not in name
        # On a GPU torch takes all weights at once unless it is told otherwise, which costs memory.
        return torch.optim.AdamW(
            parameters, lr=rate, weight_decay=recipe.weight_decay, fused=fused or None, foreach=None if fused else on_gpu
        )
    if name in ("sgd", "adafactor"):
        return torch.optim.SGD(parameters, lr=rate) if name == "sgd" else torch.optim.Adafactor(parameters, lr=rate)
    raise ValueError(
        f"the plan does not know what state {name} keeps; plan with adamw_torch, adamw_8bit, paged_adamw_8bit, adafactor or sgd"
    )


class EightBitAdam(torch.optim.Optimizer):
    """Keeps the bytes of bitsandbytes' 8-bit Adam: two states of one byte and a float32 scale for 256 of them."""

    def step(self, closure=None) -> None:
        for parameter in self._with_gradients():
            state = self.state[parameter]
            if state:
                continue
            count = parameter.numel()
            for which in ("one", "two"):
                if count < _SMALL:
                    state[which] = torch.empty(count)
                else:
                    state[which] = torch.empty(count, dtype=torch.uint8)
                    state[f"scale {which}"] = torch.empty(-(-count // _BLOCK))

    def _with_gradients(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from (p for p in group["params"] if p.grad is not None)
