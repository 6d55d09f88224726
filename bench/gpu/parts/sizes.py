"""The loss at other sizes, what each option costs, the sigmoid loss, and a large search."""

from __future__ import annotations

import torch
import torch.distributed as dist

from bench import options as loss_options
from bench.gpu import timing
from bench.gpu.report import LIMIT
from bench.gpu.timing import Peer
from bench.peers import on_gpu

SHAPES = ((4096, 1536), (16_384, 3584), (16_384, 768), (65_536, 1536))
TOKENS = 4  # a packed sample of the pooled loss


def checks(machine):
    shapes, repeats = (SHAPES, 10) if not machine.dry else (((20, 32),), 2)
    for n, d in shapes:
        seconds = 15.0 if n > 32_768 else 5.0
        some = [one for one in timing.ours(machine) if one.name != "torch.compile"]  # compiled anew for every shape
        yield from timing.checks(machine, some, n, n, d, repeats, needs=seconds)
    n, d = (16_384, 1536) if not machine.dry else (20, 16)
    yield from timing.checks(machine, options(n, d), n, n, d, repeats)
    shape = (10_000, 1_000_000, 256) if not machine.dry else (10, 50, 16)
    yield from timing.checks(machine, searches(), *shape, repeats, needs=15.0)


def _with(options: dict):
    def make(query, target, temperature):
        there = {name: value.to(query.device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        return on_gpu.ours(**{"temperature": temperature, "backend": "triton", **there})(query, target, temperature)

    return make


def ring(query, target, temperature):
    """A ring of one rank: both its passes and none of its traffic."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if query.is_cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return on_gpu.ours(backend="triton", group=dist.group.WORLD, exchange="ring")(query, target, temperature)


def pooled(query, target, temperature):
    """From the hidden states of packed samples to their gradients."""
    from contrastive_kernels import pooled_info_nce

    def packed(rows):
        ends = torch.arange(0, TOKENS * len(rows) + 1, TOKENS, device=rows.device, dtype=torch.int32)
        return rows.repeat_interleave(TOKENS, 0).requires_grad_(), ends

    (hidden_q, ends_q), (hidden_t, ends_t) = packed(query), packed(target)

    def run():
        loss = pooled_info_nce(
            hidden_q, hidden_t, query_cu_seqlens=ends_q, target_cu_seqlens=ends_t, temperature=temperature, backend="triton"
        )
        return loss.detach(), *torch.autograd.grad(loss, (hidden_q, hidden_t))

    return run


def options(n: int, d: int) -> list[Peer]:
    """Every option alone, next to the plain loss; `gate` holds what they give against float64."""
    rows = [Peer(LIMIT, on_gpu.three_gemms), Peer("option: none", on_gpu.ours(backend="triton"), predict=timing.PLAIN)]
    rows += [Peer(f"option: {name}", _with(values)) for name, (values, _) in loss_options.cases(n, d).items()]
    rows += [
        Peer("option: wrt=(), value alone", _with({"wrt": ()})),
        Peer("option: ring of one rank", ring),
        Peer(f"option: pooled, {TOKENS} tokens", pooled),
        Peer("sigmoid_loss", on_gpu.sigmoid_ours, "sigmoid"),
        Peer("sigmoid, eager", on_gpu.sigmoid_eager, "sigmoid", ours=False),
    ]
    return rows


def _search(backend):
    def make(query, target, temperature):
        from contrastive_kernels import topk_similarity

        return lambda: topk_similarity(query, target, 10, backend=backend) and None

    return make


def _search_product(query, target, temperature):
    out = torch.empty(len(query), len(target), dtype=query.dtype, device=query.device)
    return lambda: torch.mm(query, target.T, out=out) is None


def _search_dense(query, target, temperature):
    return lambda: (query @ target.T).topk(10, dim=1) and None


def searches() -> list[Peer]:
    return [
        Peer("search: its bare product", _search_product, "search"),
        Peer("search: top-10, triton", _search("triton"), "search"),
        Peer("search: top-10, torch", _search("torch"), "search"),
        Peer("search: product, then topk", _search_dense, "search", ours=False),
    ]
