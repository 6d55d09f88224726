"""The gated delta rule of a plan: as a GPU's kernels do it, which keep its inputs and make states and updates of chunks again."""

from __future__ import annotations

import torch

from ..meter import Meter

CHUNK = 64  # tokens; flash-linear-attention's


def delta_rule_flops(tokens: int, heads: int, width: int, value_width: int) -> int:
    """FLOPs of the forward pass: within chunks q k^T, k k^T and what solves for updates of keys and values, and three with the state."""
    return tokens * heads * (2 * CHUNK * (3 * width + 2 * value_width) + 6 * width * value_width)


def delta_rule_backward_flops(tokens: int, heads: int, width: int, value_width: int) -> int:
    """FLOPs of the backward pass: two products for each of the forward's, and those again that make updates and states."""
    again = tokens * heads * (2 * CHUNK * (width + value_width) + 4 * width * value_width)
    return 2 * delta_rule_flops(tokens, heads, width, value_width) + again


class DeltaRule(torch.autograd.Function):
    """Holds what flash-linear-attention holds: unit queries and keys, values, gates, and a chunk's triangular matrix for every token."""

    @staticmethod
    def forward(ctx, query, key, value, decay, beta, meter: Meter) -> torch.Tensor:
        query, key, value = (x.contiguous() for x in (query, key, value))
        shape = (len(value), value.shape[1], key.shape[2], value.shape[2])
        unit_query, unit_key, gates = torch.empty_like(query), torch.empty_like(key), torch.empty_like(decay)
        matrix, out = value.new_empty(*shape[:2], CHUNK), torch.empty_like(value)
        work = _work(value, shape)
        ctx.save_for_backward(unit_query, unit_key, value, gates, beta, matrix)
        ctx.shape, ctx.meter = shape, meter
        meter.count_flops(delta_rule_flops(*shape))
        del work
        return out

    @staticmethod
    def backward(ctx, grad) -> tuple[torch.Tensor | None, ...]:
        query, key, value, gates, beta, _ = ctx.saved_tensors
        work = _work(value, ctx.shape), _work(value, ctx.shape)  # theirs and their gradients
        ctx.meter.count_flops(delta_rule_backward_flops(*ctx.shape))
        made = [torch.empty_like(x) for x in (query, key, value, gates, beta)]
        del work
        return (*made, None)


def _work(value: torch.Tensor, shape: tuple[int, int, int, int]) -> list[torch.Tensor]:
    """Updates of values (before and after the state is known) and of keys for every token, and a state for every chunk."""
    tokens, heads, width, value_width = shape
    states = value.new_empty(-(-tokens // CHUNK), heads, width, value_width)
    return [torch.empty_like(value), torch.empty_like(value), value.new_empty(tokens, heads, width), states]
