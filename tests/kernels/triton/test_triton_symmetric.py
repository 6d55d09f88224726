"""Both directions from one panel: value and gradients of the dense reference, what keeps a problem from it, launched work."""

import types

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels import dispatch, info_nce, info_nce_value_and_grad, roofline
from contrastive_kernels.reference import info_nce_reference
from contrastive_kernels.triton import configs, launch_log, symmetric

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRUTH = torch.float64 if DEVICE == "cpu" else torch.float32
TIGHT = dict(rtol=1e-9, atol=1e-10) if TRUTH == torch.float64 else dict(rtol=1e-4, atol=1e-5)
N, D = 70, 24  # more than a tile, no multiple of one
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU one panel is for bfloat16; bench/gpu checks it there")


def unit(*shape, dtype=TRUTH):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype).to(DEVICE).requires_grad_()


@pytest.fixture
def joint_only(monkeypatch):
    """Takes one panel whatever the prices say; returns how often it was taken."""
    taken, decide, joint = [], symmetric.decide, symmetric.joint

    def forced(*args):
        plan = decide(*args)
        if plan is None:
            return None
        way = next(way for way in plan.ways if way.path == "joint")
        return dispatch.Plan(way, plan.ways, plan.title, plan.limit) if not way.reason else plan

    monkeypatch.setattr(symmetric, "decide", forced)
    monkeypatch.setattr(symmetric, "joint", lambda *args: taken.append(1) or joint(*args))
    return taken


OPTIONS = {
    "plain": lambda: {},
    "ids": lambda: dict(target_ids=torch.randint(-1, 9, (N,), device=DEVICE)),
    "normalize": lambda: dict(normalize=True),
    "hardness": lambda: dict(hardness=4.0),
    "weight, sum": lambda: dict(weight=torch.rand(N, dtype=TRUTH, device=DEVICE), reduction="sum"),
    "none": lambda: dict(reduction="none"),
    "hard negatives": lambda: dict(hard_negatives=unit(N, 3, D)),
}


@interpreted
@pytest.mark.parametrize("name", OPTIONS)
def test_against_the_reference(name, joint_only):
    options = OPTIONS[name]()
    query, target = unit(N, D), unit(N, D)
    temperature = torch.tensor(0.05, dtype=TRUTH, device=DEVICE, requires_grad=True)
    leaves = [query, target, temperature] + [v for v in options.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    got = info_nce(query, target, temperature=temperature, symmetric=True, backend="triton", **options)
    truth = info_nce_reference(query, target, temperature=temperature, symmetric=True, **options)
    torch.testing.assert_close(got, truth, **TIGHT)
    cotangent = torch.rand_like(truth) + 0.5
    for a, b in zip(torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(truth, leaves, cotangent)):
        torch.testing.assert_close(a, b, **TIGHT)
    assert joint_only  # and not two sweeps


@interpreted
@pytest.mark.parametrize("wrt", [("query",), ("target",), ()])
def test_some_gradients_alone(wrt, joint_only):
    query, target = unit(N, D).detach(), unit(N, D).detach()
    everything = info_nce_value_and_grad(query, target, symmetric=True, return_stats=True, backend="torch")
    some = info_nce_value_and_grad(query, target, symmetric=True, return_stats=True, backend="triton", wrt=wrt)
    torch.testing.assert_close(some.loss, everything.loss, **TIGHT)
    torch.testing.assert_close(some.stats.hardest_negative_cosine, everything.stats.hardest_negative_cosine, **TIGHT)
    for name in ("query", "target"):
        if name in wrt:
            torch.testing.assert_close(getattr(some, f"d_{name}"), getattr(everything, f"d_{name}"), **TIGHT)
        else:
            assert getattr(some, f"d_{name}") is None
    assert joint_only


@interpreted
@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(positives=torch.arange(N - 1, -1, -1)), "positives"),
        (dict(query_ids=torch.arange(N)), "query_ids"),
        (dict(target_mask=torch.arange(N) > 3), "target_mask"),
        (dict(mask_margin=0.1), "mask_margin"),
        (dict(label_smoothing=0.1), "label_smoothing"),
        (dict(query_negatives=True), "query_negatives"),
    ],
)
def test_two_sweeps_where_pairs_differ(options, reason, joint_only):
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    query, target = unit(N, D).detach(), unit(N, D).detach()
    got = info_nce_value_and_grad(query, target, symmetric=True, backend="triton", **options)
    truth = info_nce_value_and_grad(query, target, symmetric=True, backend="torch", **options)
    torch.testing.assert_close(got.d_target, truth.d_target, **TIGHT)
    assert not joint_only


@interpreted
# 1/80: exponents of one shift would leave the normal numbers; 5: rows longer than 1 do the same at any temperature; 3: not yet
@pytest.mark.parametrize("temperature, length, safe", [(1 / 80, 1.0, False), (0.05, 5.0, False), (0.05, 3.0, True)])
def test_two_sweeps_where_one_shift_is_unsafe(temperature, length, safe, joint_only):
    query, target = unit(N, D).detach() * length, unit(N, D).detach()
    got = info_nce_value_and_grad(query, target, symmetric=True, temperature=temperature, backend="triton")
    torch.testing.assert_close(
        got.d_query, info_nce_value_and_grad(query, target, symmetric=True, temperature=temperature, backend="torch").d_query, **TIGHT
    )
    assert bool(joint_only) == safe


@pytest.mark.parametrize(
    "inverse_norm, temperature, validate, expected",
    [
        (torch.ones(2), 20.0, False, 20.2),
        (torch.ones(2), torch.tensor(20.0), False, float("inf")),
        (None, 20.0, False, float("inf")),
        (None, 20.0, True, 101.0),
        (torch.ones(2), torch.tensor(20.0), True, 20.2),
    ],
)
def test_a_gpu_is_not_waited_for_unasked(inverse_norm, temperature, validate, expected):
    rows = torch.tensor([[0.6, 0.8], [1.0, 2.0]])  # the longest is sqrt(5)
    side = types.SimpleNamespace(source=rows, inverse_norm=inverse_norm)
    options = types.SimpleNamespace(hardness=0.0, hardness_scope="all", validate=validate)
    problem = types.SimpleNamespace(
        options=options, inverse_temperature=temperature, query=side, target=side, device=torch.device("cuda"), dtype=torch.float32
    )
    assert symmetric.largest_logit(problem) == pytest.approx(expected)


@interpreted
def test_gradcheck(joint_only):
    query, target = unit(3, 3), unit(3, 3)
    temperature, hard = torch.tensor(0.5, dtype=TRUTH, requires_grad=True), unit(3, 1, 3)
    options = dict(symmetric=True, backend="triton", target_ids=torch.tensor([0, 1, 0]))
    assert torch.autograd.gradcheck(
        lambda q, t, c, h: info_nce(q, t, temperature=c, hard_negatives=h, **options), (query, target, temperature, hard)
    )
    assert joint_only


@pytest.mark.parametrize("wrt", [("query", "target"), ("query",), ()])
def test_launched_work_equals_the_cost_model(wrt, joint_only, monkeypatch):
    n, d = 192, 64
    tile = configs.Tile(64, 64, 64, 4, 1, 2)
    monkeypatch.setattr(configs, "exp_panel", lambda *a: tile)
    query = unit(n, d, dtype=torch.bfloat16).detach()
    with launch_log.record() as launches:
        info_nce_value_and_grad(query, query.roll(1, 0), symmetric=True, backend="triton", wrt=wrt, validate=True)  # lets a GPU look
    pieces = roofline.joint(roofline.H100, n, d, itemsize=2, tile=(64, 64), d_query="query" in wrt, d_target="target" in wrt)
    for name in ("flops", "bytes"):
        assert sum(getattr(x, name) for x in launches) == sum(getattr(p, name) * p.times for p in pieces)
    assert joint_only and sum(x.flops for x in launches) == 2 * (1 + len(wrt)) * n * n * d


def test_low_precision_gradients_beat_eager(joint_only):
    query, target = unit(64, 32, dtype=torch.bfloat16).detach(), unit(64, 32, dtype=torch.bfloat16).detach()
    q, t = query.double().requires_grad_(), target.double().requires_grad_()
    info_nce_reference(q, t, temperature=0.05, symmetric=True).backward()
    result = info_nce_value_and_grad(
        query, target, temperature=0.05, symmetric=True, backend="triton", grad_dtype=torch.float32, validate=True
    )
    eager_q, eager_t = query.clone().requires_grad_(), target.clone().requires_grad_()
    logits, labels = eager_q @ eager_t.T / 0.05, torch.arange(64, device=DEVICE)
    ((torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)) / 2).backward()
    for ours, eager, truth in ((result.d_query, eager_q.grad, q.grad), (result.d_target, eager_t.grad, t.grad)):
        error = ((ours.double() - truth).norm() / truth.norm()).item()
        assert error <= 0.5 * ((eager.double() - truth).norm() / truth.norm()).item()
    assert joint_only
