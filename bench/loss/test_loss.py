"""The short form of `python -m bench loss`: pytest bench --benchmark-only."""

import pytest
import torch

from bench.loss import peers as loss_arms
from bench.loss.options import cases
from bench.loss.run import TEMPERATURE, gate, unit
from contrastive_kernels import info_nce_value_and_grad, topk_similarity

pytest.importorskip("pytest_benchmark")
N, D = 1024, 256


@pytest.fixture(scope="module")
def batch():
    return unit(N, D, torch.float32, 0), unit(N, D, torch.float32, 1)


@pytest.mark.parametrize("arm", ["ours", "naive", "F.linear_cross_entropy", "sentence-transformers", "three torch.mm", "three oneDNN"])
def test_value_and_gradients(benchmark, batch, arm):
    wrong = gate({"naive": loss_arms.naive, arm: loss_arms.ALL[arm]}, torch.float32)
    if arm in wrong:
        assert not wrong[arm].startswith("wrong"), wrong[arm]
        pytest.skip(wrong[arm])
    try:
        run = loss_arms.ALL[arm](*batch, TEMPERATURE)
    except ImportError as error:
        pytest.skip(str(error))
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("option", list(cases(N, D)))
def test_options(benchmark, batch, option):
    options = {"temperature": TEMPERATURE, **cases(N, D)[option][0]}
    result = benchmark.pedantic(lambda: info_nce_value_and_grad(*batch, **options), rounds=5, warmup_rounds=1)
    assert bool(result.loss.isfinite())


def test_topk(benchmark, batch):
    query, target = batch[0][:256], unit(50_000, D, torch.float32, 3)
    scores, indices = benchmark.pedantic(lambda: topk_similarity(query, target, 10), rounds=3, warmup_rounds=1)
    torch.testing.assert_close(scores, (query @ target.T).topk(10).values)
    assert bool((indices >= 0).all())
