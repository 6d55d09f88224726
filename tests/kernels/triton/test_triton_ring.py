"""The ring and the gathered batch over two ranks with the kernels: loss, statistics and gradients of one process, float64."""

import dataclasses
import os

import pytest
import torch

pytest.importorskip("triton")

import torch.distributed as dist
import torch.multiprocessing as mp

from contrastive_kernels import info_nce, info_nce_value_and_grad
from contrastive_kernels.triton import ring
from tests.kernels.helpers.paths import PATHS, force

SETS = [
    (),
    ("symmetric", "positives", "target_ids", "query_ids"),
    ("query_negatives", "target_negatives", "learnt_temperature"),
    ("smoothing", "hard", "own_negatives_only", "target_mask"),
    ("normalize", "margin", "hardness", "weight"),
    ("cold", "query_mask"),
    ("row_temperatures", "symmetric", "hard", "margin"),
]


def rank_main(rank, path):
    os.environ["TRITON_INTERPRET"] = "1"
    from contrastive_kernels.triton import sweep
    from tests.workers.distributed_worker import compare

    torch.set_num_threads(1)
    plan_for, taken = sweep.plan_for, []

    def cycled(*args):
        """Every way that a problem can take, in turn: both ranks count alike."""
        ways = [way for way in plan_for(*args).ways if not way.reason]
        taken.append(ways[turn % len(ways)].path)
        return dataclasses.replace(plan_for(*args), chosen=dataclasses.replace(ways[turn % len(ways)], rows=3))

    sweep.plan_for = cycled
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for index, names in enumerate(SETS):
        for turn in range(3):
            for exchange in ("ring", "gather") if turn == 0 else ("ring",):
                compare(index, names, exchange, rank, 2, dist.group.WORLD, backend="triton")
    assert {"exp", "chunk", "fused"} <= set(taken)
    generator = torch.Generator().manual_seed(rank)
    query, target = (torch.randn(rows, 16, generator=generator).bfloat16() for rows in (7, 14))
    for _ in range(3):
        options = dict(group=dist.group.WORLD, exchange="ring", backend="triton", symmetric=True, normalize=True, temperature=0.05)
        first, second = (info_nce_value_and_grad(query, target, **options) for _ in range(2))
        assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("loss", "d_query", "d_target")), (
            "differs from run to run"
        )
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process whose peer left first


@pytest.mark.skipif(torch.cuda.is_available(), reason="float64 under the interpreter")
@pytest.mark.parametrize("path", PATHS)
def test_gradcheck(path, tmp_path, monkeypatch):
    force(monkeypatch, path, rows=2)
    shards, pass_of = [], ring.differentiate_shard
    monkeypatch.setattr(ring, "differentiate_shard", lambda *args: shards.append(1) or pass_of(*args))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'alone'}", rank=0, world_size=1)
    try:
        query, target = (torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for rows in (3, 4))
        temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        options = dict(
            group=dist.group.WORLD, exchange="ring", backend="triton", normalize=True, symmetric=True, positives=torch.tensor([2, 0, 3])
        )
        assert torch.autograd.gradcheck(lambda q, t, c: info_nce(q, t, temperature=c, **options), (query, target, temperature))
    finally:
        dist.destroy_process_group()
    assert shards


@pytest.mark.skipif(torch.cuda.is_available(), reason="float64 under the interpreter")
def test_two_ranks_equal_one_process(tmp_path):
    mp.spawn(rank_main, args=(tmp_path / "store",), nprocs=2)
