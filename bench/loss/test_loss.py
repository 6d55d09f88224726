"""The short form of `python -m bench loss`: pytest bench --benchmark-only."""

import pytest
import torch

from bench.loss.run import TEMPERATURE, gate
from bench.measure import unit_rows
from bench.options import cases
from bench.peers import on_cpu
from contrastive_kernels import info_nce_value_and_grad, topk_similarity

pytest.importorskip("pytest_benchmark")
N, D = 1024, 256


@pytest.fixture(scope="module")
def batch():
    return unit_rows(N, D, torch.float32, 0), unit_rows(N, D, torch.float32, 1)


@pytest.mark.parametrize("peer", ["ours", "naive", "F.linear_cross_entropy", "sentence-transformers", "three torch.mm", "three oneDNN"])
def test_value_and_gradients(benchmark, batch, peer):
    wrong = gate({"naive": on_cpu.naive, peer: on_cpu.ALL[peer]}, torch.float32)
    if peer in wrong:
        assert not wrong[peer].startswith("wrong"), wrong[peer]
        pytest.skip(wrong[peer])
    try:
        run = on_cpu.ALL[peer](*batch, TEMPERATURE)
    except ImportError as error:
        pytest.skip(str(error))
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("option", list(cases(N, D)))
def test_options(benchmark, batch, option):
    options = {"temperature": TEMPERATURE, **cases(N, D)[option][0]}
    result = benchmark.pedantic(lambda: info_nce_value_and_grad(*batch, **options), rounds=5, warmup_rounds=1)
    assert bool(result.loss.isfinite())


def test_topk(benchmark, batch):
    query, target = batch[0][:256], unit_rows(50_000, D, torch.float32, 3)
    scores, indices = benchmark.pedantic(lambda: topk_similarity(query, target, 10), rounds=3, warmup_rounds=1)
    torch.testing.assert_close(scores, (query @ target.T).topk(10).values)
    assert bool((indices >= 0).all())
