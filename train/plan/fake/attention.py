"""Attention of a plan: packed attention as a GPU's kernels do it, which never hold the scores."""

from __future__ import annotations

from collections import Counter

import torch

from vlm2vec.attention import Segments

from ..flops import attention_backward_flops, attention_flops
from ..meter import Meter
from .delta_rule import DeltaRule


class FlashAttention:
    """A provider of packed attention (`vlm2vec.attention`) that holds what flash attention holds:
    output and log-sum-exp, never the scores."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Segments,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        window: int | None = None,
    ) -> torch.Tensor:
        """q (T, Hq, D), k and v (T, Hk, D) -> (T, Hq, D)."""
        return _FlashFunction.apply(q, k, v, Counter(segments.lengths), self.meter)

    def delta_rule(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, segments: Segments
    ) -> torch.Tensor:
        """The layers that carry a state ask for this. query, key (T, Hk, Dk), value (T, Hv, Dv), decay, beta (T, Hv) -> (T, Hv, Dv)."""
        shared = value.shape[1] // query.shape[1]
        query, key = (x.repeat_interleave(shared, dim=1) if shared > 1 else x for x in (query, key))
        return DeltaRule.apply(query, key, value, decay, beta, self.meter)


class _FlashFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths, meter):
        q, k, v = (x.contiguous() for x in (q, k, v))
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lengths, ctx.meter = lengths, meter
        meter.count_flops(sum(times * attention_flops(*_shapes(q, k, v, n)) for n, times in lengths.items()))
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _, _ = ctx.saved_tensors
        ctx.meter.count_flops(sum(times * attention_backward_flops(*_shapes(q, k, v, n)) for n, times in ctx.lengths.items()))
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


def _shapes(q, k, v, length: int) -> list[tuple[int, ...]]:
    return [(1, x.shape[1], length, x.shape[2]) for x in (q, k, v)]
