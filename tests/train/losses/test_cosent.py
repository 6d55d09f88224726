"""CoSENT of graded pairs against its formula in float64, its gradient, and over ranks."""

import math

import pytest
import torch

from tests.helpers.processes import collected, join
from train.losses import LOSSES, LossBatch
from train.losses import cosent as module
from train.losses.cosent import cosent

N, D = 9, 5
SOURCES = torch.tensor([0, 0, 1, 0, 1, 0, 0, 1, 0])


def inputs(seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    query, target = (torch.randn(N, D, generator=generator, dtype=torch.float64, **kwargs) for _ in range(2))
    grades = torch.tensor([0.0, 1.0, 2.0, 1.0, 5.0, 3.5, 0.0, 2.0, 2.0], dtype=torch.float64)
    return query, target, grades


def by_hand(query, target, grades, temperature, weighted):
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(query, target)]
    total = 1.0
    for i in range(N):
        for j in range(N):
            if SOURCES[i] == SOURCES[j] and grades[i] > grades[j]:
                total += (float(grades[i] - grades[j]) if weighted else 1.0) * math.exp((cosines[j] - cosines[i]) / temperature)
    return math.log(total)


@pytest.mark.parametrize("block", [2**24, 18], ids=["one block", "blocks of two columns"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_value_is_the_formula(monkeypatch, temperature, weighted, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    query, target, grades = inputs()
    got = cosent(query, target, grades=grades, sources=SOURCES, temperature=temperature, weighted=weighted)
    assert got.item() == pytest.approx(by_hand(query, target, grades, temperature, weighted), rel=1e-12)


@pytest.mark.parametrize("weighted", [True, False])
def test_gradient(monkeypatch, weighted):
    monkeypatch.setattr(module, "_BLOCK", 18)
    query, target, grades = inputs()

    def loss(query, target):
        return cosent(query, target, grades=grades, sources=SOURCES, temperature=0.3, weighted=weighted)

    assert torch.autograd.gradcheck(loss, (query.requires_grad_(), target.requires_grad_()))


def test_rows_that_are_masked_or_ungraded_are_as_if_they_were_not_there():
    query, target, grades = inputs()
    keep = torch.tensor([True, False, True, True, True, True, False, True, True])
    mask = keep.clone()
    mask[6] = True  # ungraded instead
    some = {"grades": grades[keep], "sources": SOURCES[keep], "temperature": 0.1}
    few = cosent(query[keep].requires_grad_(), target[keep], **some)
    grades[6], query[1] = math.nan, math.nan  # a masked row may hold anything
    leaf = query.clone().requires_grad_()
    got = cosent(leaf, target, grades=grades, sources=SOURCES, temperature=0.1, query_mask=mask, target_mask=mask)
    assert got.item() == pytest.approx(few.item(), rel=1e-12)
    got.backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[~keep].any() and leaf.grad[keep].any(dim=1).all()


def test_equal_grades_and_single_rows_cost_nothing():
    query, target, _ = inputs()
    leaf = query.clone().requires_grad_()
    loss = cosent(leaf, target, grades=torch.ones(N), sources=SOURCES, temperature=0.02)
    loss.backward()
    assert loss == 0 and not leaf.grad.any()


def test_a_batch_without_graded_rows_has_a_section_of_nothing():
    query, target, _ = inputs()
    batch = LossBatch(torch.arange(N), torch.arange(N), sources=SOURCES)
    assert LOSSES["cosent"]().function()(query, target, **LOSSES["cosent"]().options(batch)) == 0


def _rank(rank, port, queue):
    join(rank, port)
    torch.distributed.init_process_group("gloo")
    query, target, grades = inputs()
    part = slice(0, 4) if rank == 0 else slice(4, 8)
    leaves = [x[part].clone().requires_grad_() for x in (query, target)]
    loss = cosent(*leaves, grades=grades[part], sources=SOURCES[part], temperature=0.1, group=torch.distributed.group.WORLD)
    loss.backward()
    queue.put((rank, "cosent", loss.item(), *(leaf.grad.numpy().copy() for leaf in leaves)))
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_loss_and_twice_the_gradient_of_one():
    query, target, grades = inputs()
    leaves = [x[:8].clone().requires_grad_() for x in (query, target)]
    loss = cosent(*leaves, grades=grades[:8], sources=SOURCES[:8], temperature=0.1)
    loss.backward()
    found = collected(_rank, each=1)
    for rank, part in enumerate((slice(0, 4), slice(4, 8))):
        got, *gradients = found["cosent", rank]
        assert got == pytest.approx(loss.item(), rel=1e-12)
        for leaf, gradient in zip(leaves, gradients):
            torch.testing.assert_close(torch.from_numpy(gradient), 2 * leaf.grad[part], rtol=1e-12, atol=1e-14)
