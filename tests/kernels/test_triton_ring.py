"""The ring and the gathered batch over two ranks with the kernels: loss, statistics and gradients of one process, float64."""

import dataclasses
import os

import pytest
import torch

pytest.importorskip("triton")

import torch.multiprocessing as mp  # noqa: E402

SETS = [
    (), ("symmetric", "positives", "target_ids", "query_ids"), ("query_negatives", "target_negatives", "learnt_temperature"),
    ("smoothing", "hard", "own_negatives_only", "target_mask"), ("normalize", "margin", "hardness", "weight"), ("cold", "query_mask"),
]


def rank_main(rank, path):
    os.environ["TRITON_INTERPRET"] = "1"
    import torch.distributed as dist

    from contrastive_kernels.triton import sweep
    from tests.kernels.distributed_worker import compare

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
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process whose peer left first


@pytest.mark.skipif(torch.cuda.is_available(), reason="float64 under the interpreter")
def test_two_ranks_equal_one_process(tmp_path):
    mp.spawn(rank_main, args=(tmp_path / "store",), nprocs=2)
