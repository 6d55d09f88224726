"""The sigmoid loss with the kernel: value and gradients of the dense reference, small pairs to the last digits, launched work."""

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels import sigmoid_loss
from contrastive_kernels.core import sigmoid
from contrastive_kernels.reference import sigmoid_loss_reference
from contrastive_kernels.triton import configs, launch_log
from contrastive_kernels.triton.backend import TRITON
from contrastive_kernels.triton.kernels import sigmoid_panel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRUTH = torch.float64 if DEVICE == "cpu" else torch.float32
TIGHT = dict(rtol=1e-9, atol=1e-10) if TRUTH == torch.float64 else dict(rtol=1e-4, atol=1e-5)
N, M, D = 19, 57, 24  # several tiles of 16, none of them whole


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernel instead of plain torch, in panels of 8 rows of float64."""
    tile = configs.Tile(16, 16, 16, 4, 1, 2)
    monkeypatch.setattr(configs, "sigmoid_panel", lambda *a: tile)
    monkeypatch.setattr(sigmoid, "choose", lambda *a: TRITON)
    monkeypatch.setattr(sigmoid_panel, "PANEL_BYTES", 8 * M * 8)


def unit(*shape, dtype=TRUTH):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype).to(DEVICE).requires_grad_()


def ints(*shape, low=0, high=4):
    return torch.randint(low, high, shape, device=DEVICE)


OPTIONS = {
    "plain": lambda: {},
    "positives": lambda: dict(positives=torch.where(ints(N) == 0, -100, ints(N, high=M))),
    "ids": lambda: dict(query_ids=ints(N, low=-1, high=9), target_ids=ints(M, low=-1, high=9)),
    "ids of positives": lambda: dict(target_ids=ints(M, low=-1, high=9)),
    "masks": lambda: dict(query_mask=ints(N) > 0, target_mask=ints(M) > 0),
    "normalize, weight, sum": lambda: dict(normalize=True, weight=torch.rand(N, dtype=TRUTH, device=DEVICE), reduction="sum"),
    "none": lambda: dict(reduction="none"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_against_the_reference(name):
    options = OPTIONS[name]()
    query, target = unit(N, D), unit(M, D)
    scale, bias = (torch.tensor(v, dtype=TRUTH, device=DEVICE, requires_grad=True) for v in (10.0, -3.0))
    leaves = [query, target, scale, bias]
    got, truth = (f(query, target, scale=scale, bias=bias, **options) for f in (sigmoid_loss, sigmoid_loss_reference))
    torch.testing.assert_close(got, truth, **TIGHT)
    cotangent = torch.randn_like(truth)
    for a, b in zip(torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(truth, leaves, cotangent)):
        torch.testing.assert_close(a, b, **TIGHT)


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 under the interpreter")
def test_gradcheck():
    query, target = unit(2, 3), unit(3, 3)
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, -1.0))
    assert torch.autograd.gradcheck(
        lambda q, t, s, b: sigmoid_loss(q, t, scale=s, bias=b, positives=torch.tensor([2, 0])), (query, target, scale, bias)
    )


# -10: SigLIP's start, where a negative's loss is e^-10; -30: beyond what 1 + e holds in float32; 40: the same of the other sign
@pytest.mark.parametrize("bias", [-10.0, -30.0, 40.0])
def test_small_pairs_keep_their_digits(bias):
    x, y = unit(8, 16, dtype=torch.float32).detach(), unit(20, 16, dtype=torch.float32).detach()

    def number(value):
        return torch.tensor(value, device=DEVICE)

    out = torch.full((8, 20), float("nan"), device=DEVICE)
    loss, slope, along = sigmoid_panel.sigmoid_panel(x, y, scale=number(1.0), bias=number(bias), out=out)
    logits = x.double() @ y.double().T + bias
    torch.testing.assert_close(loss.double(), torch.nn.functional.softplus(logits, threshold=1e9).sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.double(), logits.sigmoid(), rtol=1e-5, atol=0)
    torch.testing.assert_close(slope.double(), logits.sigmoid().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(along.double(), (logits.sigmoid() * (logits - bias)).sum(1), rtol=1e-4, atol=1e-6 * float(slope.max()))


def test_low_precision_gradients_are_no_worse_than_eager():
    query, target = unit(48, 32, dtype=torch.bfloat16), unit(48, 32, dtype=torch.bfloat16)
    q, t = query.detach().double().requires_grad_(), target.detach().double().requires_grad_()
    truth = torch.autograd.grad(sigmoid_loss_reference(q, t, scale=10.0, bias=-10.0), (q, t))
    ours = torch.autograd.grad(sigmoid_loss(query, target, scale=10.0, bias=-10.0), (query, target))
    eager = torch.autograd.grad(sigmoid_loss_reference(query, target, scale=10.0, bias=-10.0), (query, target))
    for a, b, right in zip(ours, eager, truth):
        assert (a.double() - right).norm() <= (b.double() - right).norm() + torch.finfo(torch.bfloat16).eps * right.norm()


# SigLIP trains to biases near -17, where a negative's derivative is less than float16's least number; ids of -1: no pair that belongs
# together hides the negatives; a weight of 1e5, since gradients come out in float16 too
@pytest.mark.parametrize("bias", [-10.0, -17.0, -20.0])
def test_float16_keeps_small_negatives(bias):
    query, target = unit(N, D, dtype=torch.float16), unit(M, D, dtype=torch.float16)
    options = dict(
        scale=3.0, bias=bias, query_ids=torch.full((N,), -1, device=DEVICE), target_ids=torch.zeros(M, dtype=torch.int64, device=DEVICE)
    )
    options |= dict(weight=torch.full((N,), 1e5, device=DEVICE), reduction="sum")
    q, t = query.detach().double().requires_grad_(), target.detach().double().requires_grad_()
    truth = torch.autograd.grad(sigmoid_loss_reference(q, t, **options), (q, t))
    for ours, right in zip(torch.autograd.grad(sigmoid_loss(query, target, **options), (query, target)), truth):
        assert (ours.double() - right).norm() <= 2 * torch.finfo(torch.float16).eps * right.norm()


def test_launched_work_and_repeatability():
    n, d = 32, 32
    query, target = unit(n, d, dtype=torch.bfloat16), unit(n, d, dtype=torch.bfloat16)
    made = []
    for _ in range(2):
        with launch_log.record() as launches:
            loss = sigmoid_loss(query, target, scale=10.0, bias=-10.0)
        made.append((loss, *torch.autograd.grad(loss, (query, target))))
    assert all(torch.equal(a, b) for a, b in zip(*made))
    assert sum(x.flops for x in launches) == 6 * n * n * d
    assert {x.name for x in launches} == {"sigmoid_panel", "gemm", "rows_update", "row_scaled"}
    assert sum(x.bytes_written for x in launches if x.name == "sigmoid_panel") == 2 * n * n + 3 * 4 * n * 2
