"""Matryoshka levels in one sweep: value and gradients of the dense reference, the seams, and launched work."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels import dispatch, info_nce, info_nce_value_and_grad, roofline
from contrastive_kernels.reference import info_nce_reference
from contrastive_kernels.triton import configs, launch_log
from contrastive_kernels.triton import matryoshka as levels

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="float64 under the interpreter; bench/gpu checks a GPU")
N, M, DIMS = 19, 57, (16, 32, 40)


def unit(*shape, dtype=torch.float64):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype).requires_grad_()


@pytest.fixture
def one_sweep(monkeypatch):
    """Levels share a sweep whatever the prices say, in panels of 7 rows; returns how often they did."""
    taken, plan, compute = [], levels.plan, levels.compute

    def forced(*args):
        made = plan(*args)
        way = made.ways[0]
        return made if way.reason else dataclasses.replace(made, chosen=dataclasses.replace(way, rows=7))

    tile = configs.Tile(16, 16, 16, 4, 1, 2)
    monkeypatch.setattr(configs, "exp_panel", lambda *a: tile)
    monkeypatch.setattr(levels, "plan", forced)
    monkeypatch.setattr(levels, "compute", lambda *args, **kwargs: taken.append(1) or compute(*args, **kwargs))
    return taken


def ints(*shape, low=0, high=4):
    return torch.randint(low, high, shape)


OPTIONS = {
    "plain": lambda: {},
    "symmetric, ids": lambda: dict(symmetric=True, target_ids=ints(M, low=-1, high=20)),
    "more negatives": lambda: dict(query_negatives=True, target_negatives=True, query_ids=ints(N, low=-1, high=9), hardness=3.0),
    "masks, margin": lambda: dict(query_mask=ints(N) > 0, target_mask=ints(M) > 0, mask_margin=0.05, own_negatives_only=ints(N) == 0),
    "hard negatives, weight": lambda: dict(hard_negatives=unit(N, 3, DIMS[-1]), weight=torch.rand(N, dtype=torch.float64), reduction="sum"),
    "none": lambda: dict(reduction="none"),
    "cold": lambda: dict(temperature=torch.tensor(0.002, dtype=torch.float64, requires_grad=True)),  # every row is done again
}


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the unsafe shift of the first launch, done again
@pytest.mark.parametrize("name", OPTIONS)
def test_against_the_reference(name, one_sweep):
    options = {"temperature": torch.tensor(0.05, dtype=torch.float64, requires_grad=True), **OPTIONS[name]()}
    options |= dict(matryoshka_dims=DIMS, matryoshka_weights=(0.5, 1.0, 2.0))
    query, target = unit(N, DIMS[-1]), unit(M, DIMS[-1])
    leaves = [query, target] + [v for v in options.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    got, truth = info_nce(query, target, backend="triton", **options), info_nce_reference(query, target, **options)
    torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn_like(truth)
    for a, b in zip(torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(truth, leaves, cotangent)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert one_sweep


def test_gradcheck(one_sweep, monkeypatch):
    monkeypatch.setattr(configs, "exp_panel", lambda *a: configs.Tile(4, 4, 2, 4, 1))
    query, target, hard = unit(2, 4), unit(3, 4), unit(2, 1, 4)
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    options = dict(matryoshka_dims=(2, 4), matryoshka_weights=(0.5, 2.0), positives=torch.tensor([2, 0]), backend="triton")
    assert torch.autograd.gradcheck(
        lambda q, t, c, h: info_nce(q, t, temperature=c, hard_negatives=h, **options), (query, target, temperature, hard)
    )
    assert one_sweep


def strided(vector):
    return torch.stack([vector, ~vector if vector.dtype == torch.bool else vector + 1], dim=1)[:, 0]


def test_vectors_that_are_not_contiguous(one_sweep):
    query, target = unit(N, DIMS[-1]).detach(), unit(M, DIMS[-1]).detach()
    masks = dict(
        target_ids=ints(M, low=-1, high=20), query_mask=ints(N) > 0, target_mask=ints(M) > 0, weight=torch.rand(N, dtype=torch.float64)
    )
    options = dict(matryoshka_dims=DIMS, backend="triton", wrt=("query", "target"))
    near, far = (info_nce_value_and_grad(query, target, **options, **m) for m in (masks, {k: strided(v) for k, v in masks.items()}))
    assert torch.equal(near.loss, far.loss) and torch.equal(near.d_query, far.d_query) and torch.equal(near.d_target, far.d_target)
    assert len(one_sweep) == 2


def test_statistics_and_the_value_alone(one_sweep):
    query, target = unit(N, DIMS[-1]).detach(), unit(M, DIMS[-1]).detach()
    got, truth = (
        info_nce_value_and_grad(query, target, matryoshka_dims=DIMS, return_stats=True, wrt=(), backend=b) for b in ("triton", "torch")
    )
    torch.testing.assert_close(got.loss, truth.loss)
    for field in dataclasses.fields(truth.stats):
        torch.testing.assert_close(getattr(got.stats, field.name), getattr(truth.stats, field.name))
    assert one_sweep


@pytest.mark.parametrize(
    "options", [dict(matryoshka_dims=(12, 40)), dict(matryoshka_dims=(40, 16)), dict(matryoshka_dims=DIMS, label_smoothing=0.1)]
)
def test_a_sweep_each_where_they_cannot_share(options, one_sweep):
    query, target = unit(N, DIMS[-1]).detach(), unit(M, DIMS[-1]).detach()
    got, truth = (info_nce_value_and_grad(query, target, backend=b, **options) for b in ("triton", "torch"))
    torch.testing.assert_close(got.d_query, truth.d_query)
    assert not one_sweep


def test_launched_work_equals_the_cost_model(one_sweep, monkeypatch):
    n, dims = 64, (32, 64)
    tile = configs.Tile(32, 32, 32, 4, 1, 2)
    monkeypatch.setattr(configs, "exp_panel", lambda *a: tile)
    monkeypatch.setattr(configs, "exp_panel_tile", lambda *a, **k: (32, 32))
    way = dispatch.plan_levels(n, n, dims, "bfloat16", workspace=1 << 24, interpreted=True).ways[0]
    monkeypatch.setattr(levels, "plan", lambda *args: dispatch.Plan(way, (way,), "", 1.0))
    query = unit(n, dims[-1], dtype=torch.bfloat16).detach()
    with launch_log.record() as launches:
        info_nce_value_and_grad(query, query.roll(1, 0), matryoshka_dims=dims, backend="triton")
    assert sum(x.flops for x in launches) == sum(p.flops * p.times for p in way.pieces) == 2 * n * n * (64 + 2 * 96)
    assert sum(x.bytes for x in launches) == sum(p.bytes * p.times for p in way.pieces)


def test_prices_and_their_explanation(capsys):
    made = dispatch.plan_levels(16_384, 16_384, (128, 256, 512, 1024), "bfloat16", workspace=8 << 30, gpu=roofline.A100, explain=print)
    assert "PREDICTED" in capsys.readouterr().out
    assert made.chosen.seconds == min(way.seconds for way in made.ways)
    assert "cannot: because" in dispatch.plan_levels(64, 64, (32, 64), "bfloat16", workspace=1 << 24, reason="because").text()
