"""Two and four gloo ranks give the single-process loss, statistics and gradients to 1e-10 in float64, gather and ring."""

import pytest
import torch.multiprocessing as mp

from tests.workers import distributed_worker


@pytest.mark.parametrize("world, count", [(2, 30), (4, 15)])
def test_ranks_equal_one_process(world, count, tmp_path):
    mp.spawn(distributed_worker.run, args=(world, tmp_path / "store", count), nprocs=world)
