"""The gated delta rule over packed samples in plain torch, for every device and dtype.

For each head, with S (Dk, Dv) zero at a sample's first token,

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) k_t^T S_{t-1}))^T,      o_t = q_t^T S_t / sqrt(Dk)

(Gated Delta Networks, arXiv:2412.06464, equation 10; q and k of length 1). Within a chunk of C tokens, with G_i = g_1 + ... + g_i,
the updates u_i = beta_i (v_i - exp(G_i) k_i^T S_0 - sum_{j<i} exp(G_i - G_j) (k_i . k_j) u_j) are a unit triangular system (section
3.3): one solve for all rows, then o = exp(G) q S_0 + (q k^T masked and decayed) u, and S_C = exp(G_C) S_0 + sum_j exp(G_C - G_j) k_j u_j^T.

float32 inside, as published; float64 stays float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

EPS = 1e-6  # under the root of the length of q and k


class _Rows(torch.autograd.Function):
    """x[rows], and in backward rows copied back instead of added up: padding repeats rows, and its gradients are zero."""

    @staticmethod
    def forward(ctx, x, rows, back) -> torch.Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad) -> torch.Tensor:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Back(torch.autograd.Function):
    """x[back], the reverse of `_Rows`."""

    @staticmethod
    def forward(ctx, x, rows, back) -> torch.Tensor:
        ctx.save_for_backward(back)
        ctx.shape = x.shape
        return x.index_select(0, back)

    @staticmethod
    def backward(ctx, grad) -> torch.Tensor:
        return grad.new_zeros(ctx.shape).index_copy_(0, ctx.saved_tensors[0], grad), None, None


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of length 1."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS)


def gated_delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, layout: dict[str, Any]
) -> torch.Tensor:
    """The rule on every sample of a packed batch.

    Args:
        query, key: (T, Hk, Dk), of any length; they are normalised here.
        value: (T, Hv, Dv); a key head serves Hv / Hk value heads that stand together.
        decay: (T, Hv), logarithms of what the state keeps at each token, at most 0.
        beta: (T, Hv) in [0, 1], how much of a key's old value is replaced.
        layout: `delta_layout` of the samples.

    Returns:
        (T, Hv, Dv) in `value`'s dtype.

    Example:
        >>> import torch
        >>> from vlm2vec.backbones.qwen3_5.layout import delta_layout
        >>> q, k, v = torch.ones(3, 1, 4), torch.ones(3, 1, 4), torch.ones(3, 1, 2)
        >>> gated_delta_rule(q, k, v, torch.zeros(3, 1), torch.ones(3, 1), delta_layout([2, 1], key_heads=1, value_heads=1))[:, 0, 0]
        tensor([0.5000, 0.5000, 0.5000])
    """
    with torch.autocast(value.device.type, enabled=False):
        wide = torch.promote_types(value.dtype, torch.float32)
        query, key = unit(query.to(wide)) * query.shape[-1] ** -0.5, unit(key.to(wide))
        packed = [query, key, value.to(wide), decay.to(wide), beta.to(wide)]
        rows = [layout["key_rows"]] * 2 + [layout["value_rows"]] * 3
        picked = [_Rows.apply(x.flatten(0, 1), *index) for x, index in zip(packed, rows)]
        out = torch.cat([part.flatten(0, 2) for part in _chunks(*picked, layout, key.shape[1], value.shape[1])])
        return _Back.apply(out, *layout["value_rows"]).view(value.shape).to(value.dtype)


def _chunks(query, key, value, decay, beta, layout: dict[str, Any], key_heads: int, value_heads: int) -> list[torch.Tensor]:
    """Outputs (chunks, Hv, C, Dv) of each group, in their order."""
    groups, steps = layout["groups"], layout["steps"]
    sizes = [group["count"] * group["width"] for group in groups]
    per_key, per_value = [n * key_heads for n in sizes], [n * value_heads for n in sizes]
    split = [x.split(per_key) for x in (query, key)] + [x.split(per_value) for x in (value, decay, beta)]
    chunks = [_chunk(group, *parts, key_heads, value_heads) for group, *parts in zip(groups, *split)]
    whole = [chunk for group, chunk in zip(groups, chunks) if group["whole"]]
    tails = [(group["state"], chunk) for group, chunk in zip(groups, chunks) if not group["whole"]]
    outs, states = _scan(whole, steps, any(which is not None for which, _ in tails)) if whole else ([], None)
    return outs + [chunk.output(None if which is None else states.index_select(0, which))[0] for which, chunk in tails]


def _scan(whole: list[_Chunk], steps: list[int], wanted: bool) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Outputs of whole chunks, and the states in which samples leave them, (samples, Hv, Dk, Dv), few chunks first; None unless `wanted`.

    Args:
        whole: those that begin a sample, and those that go on where there are any. steps: how many there are at each place.
    """
    out, updates = whole[0].output(None)
    outs, ended, at = [out], [], 0
    state = whole[0].state(None, updates) if wanted or len(steps) > 1 else None
    for place, n in enumerate(steps[1:], 2):
        ended.append(state[n:])
        state, part = state[:n], whole[1].rows(at, at + n)
        out, updates = part.output(state)
        outs.append(out)
        state = part.state(state, updates) if wanted or place < len(steps) else None
        at += n
    return outs, torch.cat([*ended, state]) if wanted else None


@dataclass
class _Chunk:
    """n chunks of one width C: what they take of themselves, before any state is known.

    Attributes:
        attention: (n, Hv, C, C) decayed products of queries and keys.
        new: (n, Hv, C, Dv), the updates of a state of zeros; read: (n, Hv, C, Dk), what these lose by each row of the state.
        query: (n, Hv, C, Dk) decayed since the chunk's start. None, as `read`, where chunks begin a sample.
        key: (n, Hv, C, Dk) decayed until the chunk's end; kept: (n, Hv, 1, 1), the state's decay over it. None for tails.
    """

    attention: torch.Tensor
    new: torch.Tensor
    read: torch.Tensor | None = None
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    def rows(self, first: int, last: int) -> _Chunk:
        return _Chunk(*(None if x is None else x[first:last] for x in vars(self).values()))

    def output(self, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(outputs, updates), both (n, Hv, C, Dv), from the state (n, Hv, Dk, Dv) before the chunk; None is zeros."""
        if state is None:
            return self.attention @ self.new, self.new
        updates = self.new - self.read @ state
        return self.query @ state + self.attention @ updates, updates

    def state(self, state: torch.Tensor | None, updates: torch.Tensor) -> torch.Tensor:
        """The state behind the chunk."""
        added = self.key.mT @ updates
        return added if state is None else state * self.kept + added


def _chunk(group: dict[str, Any], query, key, value, decay, beta, key_heads: int, value_heads: int) -> _Chunk:
    """The chunks of a group from its rows: (n * heads * C, width) of queries, keys and values, (n * Hv * C,) of the gates."""
    n, width = group["count"], group["width"]
    query, key = (x.view(n, key_heads, 1, width, -1) for x in (query, key))
    value, decay, beta = (x.view(n, key_heads, value_heads // key_heads, width, *x.shape[1:]) for x in (value, decay, beta))
    total = decay.cumsum(-1)
    later = torch.ones(width, width, dtype=torch.bool, device=total.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()
    attention = (query @ key.mT) * between
    system = (key @ key.mT) * between * beta[..., None]
    right = value * beta[..., None]
    if not group["fresh"]:
        since = total.exp()[..., None]
        right = torch.cat([right, key * (since * beta[..., None])], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new, read = solved[..., : value.shape[-1]], solved[..., value.shape[-1] :]
    parts = {"attention": attention, "new": new}
    if not group["fresh"]:
        parts |= {"read": read, "query": query * since}
    if group["whole"]:
        parts |= {"key": key * (total[..., -1:] - total).exp()[..., None], "kept": total[..., -1:, None].exp()}
    return _Chunk(**{name: part.flatten(1, 2) for name, part in parts.items()})
