"""What our own options and entries cost on a GPU, in the manner of `gpu_peers`: `make(query, target, temperature) -> callable`.

No errors are measured here: `gpu_gate` holds every one of them against float64 before anything is timed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from bench import loss_options
from bench.gpu_peers import LIMIT, ours, three_gemms

TOKENS = 4  # a packed sample of the pooled loss


def _with(options: dict, **more):
    def make(query, target, temperature):
        there = {name: value.to(query.device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        return ours(**{"temperature": temperature, "backend": "triton", **there, **more})(query, target, temperature)

    return make


def _ring(query, target, temperature):
    """A ring of one rank: both its passes and none of its traffic."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if query.is_cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return ours(backend="triton", group=dist.group.WORLD, exchange="ring")(query, target, temperature)


def _pooled(query, target, temperature):
    """From the hidden states of packed samples to their gradients."""
    from contrastive_kernels import pooled_info_nce

    def packed(rows):
        return rows.repeat_interleave(TOKENS, 0).requires_grad_(), torch.arange(0, TOKENS * len(rows) + 1, TOKENS, device=rows.device, dtype=torch.int32)

    (hidden_q, ends_q), (hidden_t, ends_t) = packed(query), packed(target)

    def run():
        loss = pooled_info_nce(hidden_q, hidden_t, query_cu_seqlens=ends_q, target_cu_seqlens=ends_t, temperature=temperature, backend="triton")
        return loss.detach(), *torch.autograd.grad(loss, (hidden_q, hidden_t))

    return run


def table(n: int, d: int) -> dict:
    """Rows by name for N = M = n: the plain loss, every option alone, the value without gradients, a ring of one, pooled."""
    rows = {LIMIT: three_gemms, "plain": ours(backend="triton")}
    rows |= {name: _with(options) for name, (options, _) in loss_options.cases(n, d).items()}
    rows |= {"symmetric, normalize": _with({"symmetric": True, "normalize": True}), "value alone": _with({}, wrt=()), "ring of one": _ring}
    return rows | {f"pooled, {TOKENS} tokens": _pooled}
