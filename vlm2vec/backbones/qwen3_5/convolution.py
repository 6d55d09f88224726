"""The causal depthwise convolution over packed samples, with SiLU behind it, in plain torch.

Each window adds up rows shifted by 0, 1, ... tokens, over the packed sequence as if it were one sample; then the few rows whose
windows reach over a sample's first token are made anew from their own sample alone. Sums have one order wherever a sample stands.
"""

from __future__ import annotations

import torch


def causal_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layout: dict[str, torch.Tensor]) -> torch.Tensor:
    """SiLU of sum_j weight[c, K - 1 - j] x[t - j, c] (+ bias), over the tokens of the same sample.

    Args:
        x: (T, C). weight: (C, K), oldest first. bias: (C,) or None.
        layout: `convolution_layout` of the samples for K.

    Returns:
        (T, C) in `x`'s dtype.
    """
    out = _Convolution.apply(x, weight.to(x.dtype), layout["early"], layout["taps"], layout["inside"])
    return torch.nn.functional.silu(out if bias is None else out + bias.to(x.dtype))


class _Convolution(torch.autograd.Function):
    """Saves its inputs and nothing else: autograd by operation would keep and add up a tensor of x's size for every shift."""

    @staticmethod
    def forward(ctx, x, weight, early, taps, inside) -> torch.Tensor:
        ctx.save_for_backward(x, weight, early, taps, inside)
        taken = weight.T.contiguous()  # (K, C)
        out = x * taken[-1]
        for back in range(1, min(len(taken), len(x))):
            out[back:].addcmul_(x[:-back], taken[-1 - back])
        rows = torch.where(inside, x[taps], 0)
        made = rows[:, -1] * taken[-1]
        for back in range(1, len(taken)):
            made.addcmul_(rows[:, -1 - back], taken[-1 - back])
        return out.index_copy_(0, early, made)

    @staticmethod
    def backward(ctx, grad) -> tuple[torch.Tensor | None, ...]:
        x, weight, early, taps, inside = ctx.saved_tensors
        taken = weight.T.contiguous()
        own = grad.index_select(0, early)
        grad = grad.index_fill(0, early, 0)
        shifts = range(1, min(len(taken), len(x)))
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = grad * taken[-1]
            for back in shifts:
                d_x[:-back].addcmul_(grad[back:], taken[-1 - back])
            spread = torch.where(inside, own[:, None] * taken, 0)
            for tap in range(len(taken)):  # one at a time: no row twice, so that a GPU adds in one order
                d_x.index_add_(0, taps[:, tap], spread[:, tap])
        if ctx.needs_input_grad[1]:
            d_taken = torch.where(inside, x[taps] * own[:, None], 0).sum(0)
            d_taken[-1] += (grad * x).sum(0)
            for back in shifts:
                d_taken[-1 - back] += (grad[back:] * x[:-back]).sum(0)
            d_weight = d_taken.T
        return d_x, d_weight, None, None, None
