"""The way of small plain losses: against float64, where the positive wins and where it cannot, and what it does not take."""

import pytest
import torch

pytest.importorskip("triton")

import contrastive_kernels as ck
from contrastive_kernels.reference import info_nce_reference
from contrastive_kernels.triton.dense import BLOCK_C, slopes
from contrastive_kernels.triton.kernels.common import INTERPRET
from tests.kernels.helpers.paths import force

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"


def unit(*shape, dtype=torch.float32):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64, device=DEVICE), dim=-1).to(dtype)


def truth(query, target, **options):
    leaves = [x.double().requires_grad_() for x in (query, target)]
    loss = info_nce_reference(
        *leaves, **{k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    )
    loss.backward()
    return loss.detach(), *(x.grad for x in leaves)


# one pair has no negative at all; odd; more targets than queries; wider than a block is in test_wider_than_a_block
@pytest.mark.parametrize("n, m, d", [(1, 1, 8), (5, 5, 16), (7, 35, 24), (33, 33, 64)])
@pytest.mark.parametrize("options", [{}, dict(temperature=0.2, reduction="sum"), dict(temperature=0.001)], ids=str)
def test_value_and_gradients(n, m, d, options, monkeypatch):
    force(monkeypatch, "dense")
    query, target = unit(n, d), unit(m, d)
    weight = torch.rand(n, device=DEVICE) + 0.1
    got = ck.info_nce_value_and_grad(query, target, backend="triton", weight=weight, **options)
    for mine, right in zip((got.loss, got.d_query, got.d_target), truth(query, target, weight=weight, **options)):
        scale = right.abs().max().clamp(min=1e-30)
        # float32 logits of up to 1 / temperature, whose last place is theirs
        assert (mine.double() - right).abs().max() <= scale * (
            2e-6 + 2**-22 / options.get("temperature", 0.02)
        ) or right.abs().max() < 1e-30


def test_a_small_loss_keeps_its_digits(monkeypatch):
    """Where every positive wins the loss is the negatives' share, of which a difference of logarithms would leave nothing."""
    force(monkeypatch, "dense")
    query = torch.eye(16, 32, device=DEVICE) + 0.01 * unit(16, 32)
    target = torch.eye(16, 32, device=DEVICE)
    got = ck.info_nce_value_and_grad(query, target, backend="triton", temperature=0.07)
    loss, d_query, d_target = truth(query, target, temperature=0.07)
    assert 1e-6 < loss < 1e-4
    assert (got.loss - loss).abs() <= 3e-6 * loss
    for mine, right in ((got.d_query, d_query), (got.d_target, d_target)):
        assert (mine - right).norm() <= 3e-6 * right.norm()


def test_wider_than_a_block():
    cos = torch.randn(3, BLOCK_C + 5, dtype=torch.float32, device=DEVICE) * 0.1
    positives, weight = torch.tensor([0, BLOCK_C + 4, BLOCK_C], device=DEVICE), torch.tensor([1.0, 0.0, 2.0], device=DEVICE)
    made, loss = slopes(cos, torch.tensor(20.0, device=DEVICE), positives, weight, torch.float32)
    leaf = cos.double().requires_grad_()
    rows = torch.nn.functional.cross_entropy(leaf * 20, positives, reduction="none") * weight.double()
    rows.sum().backward()
    torch.testing.assert_close(loss.double(), rows.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made.double(), leaf.grad, rtol=1e-5, atol=1e-7)
    assert not made[1].any()


def test_a_nan_stays_one(monkeypatch):
    force(monkeypatch, "dense")
    query, target = unit(6, 8), unit(6, 8)
    target[3, 2] = float("nan")
    assert ck.info_nce_value_and_grad(query, target, backend="triton").loss.isnan()


@pytest.mark.parametrize(
    "options",
    [
        dict(normalize=True),
        dict(label_smoothing=0.1),
        dict(return_stats=True),
        dict(hardness=1.0),
        dict(mask_margin=0.1),
        dict(target_ids=torch.arange(6)),
        dict(target_mask=torch.ones(6, dtype=torch.bool)),
        dict(temperature=torch.tensor(0.1)),
        dict(wrt=("query",)),
        dict(hard_negatives=torch.randn(6, 1, 8)),
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_it_does_not_know_it_does_not_take(options, monkeypatch):
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.raises(pytest.skip.Exception, match="only a loss without options"):
        force(monkeypatch, "dense")
        ck.info_nce_value_and_grad(unit(6, 8), unit(6, 8), backend="triton", **options)
