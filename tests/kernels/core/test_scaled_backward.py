"""Backward reuses the memory of the gradients that the forward made, where the graph is freed after it, and nowhere else."""

import sys

import pytest
import torch

from contrastive_kernels import distillation_loss, info_nce, info_nce_value_and_grad, sigmoid_loss
from contrastive_kernels.core.autograd import scaled as cotangents
from tests.kernels.helpers.sampling import Case

LOSSES = {
    "info_nce": lambda q, t: info_nce(q, t, temperature=0.2, symmetric=True),
    "sigmoid_loss": lambda q, t: sigmoid_loss(q, t, scale=5.0, bias=-2.0),
    "distillation_loss": lambda q, t: distillation_loss(q, t, t.detach(), q.detach(), temperature=0.5),
}


@pytest.fixture
def saved(monkeypatch):
    """Where the gradients lie that each backward finds."""
    places = []

    def watched(gradients, cotangent, dtypes):
        places.append([gradient.data_ptr() for gradient in gradients if gradient.numel()])
        return cotangents.scaled(gradients, cotangent, dtypes)

    for name in ("info_nce_op", "core.autograd.direct", "sigmoid_loss", "distillation_loss"):
        monkeypatch.setattr(sys.modules[f"contrastive_kernels.{name}"], "scaled", watched)
    return places


def batch(dtype=torch.float64):
    case = Case(3, 6, 6, 5)
    return [x.to(dtype).requires_grad_() for x in (case.query, case.target)]


def expected(loss, factor=1.0):
    leaves = batch()
    return [g * factor for g in torch.autograd.grad(loss(*leaves), leaves, retain_graph=True)]


@pytest.mark.parametrize("factor", [1.0, 3.0, -0.5, 0.0])
@pytest.mark.parametrize("name", LOSSES)
def test_once(name, factor, saved):
    leaves, truth = batch(), expected(LOSSES[name], factor)
    saved.clear()
    (LOSSES[name](*leaves) * factor).backward()
    for leaf, true in zip(leaves, truth):
        torch.testing.assert_close(leaf.grad, true, rtol=1e-14, atol=0)
    assert sorted(leaf.grad.data_ptr() for leaf in leaves) == sorted(saved[0]), "a second copy was made"


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_graph_that_is_kept(name, factor, saved):
    leaves, truth = batch(), expected(LOSSES[name], factor)
    saved.clear()
    loss = LOSSES[name](*leaves) * factor
    for turn in range(1, 4):
        loss.backward(retain_graph=turn < 3)
        for leaf, true in zip(leaves, truth):
            torch.testing.assert_close(leaf.grad, true * turn, rtol=1e-13, atol=0)
            if turn < 3:
                assert leaf.grad.data_ptr() not in saved[-1]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("name", LOSSES)
def test_what_the_caller_does_to_its_gradient_stays_with_it(name):
    """A gradient that was changed, between the uses of a kept graph."""
    leaves, truth = batch(), expected(LOSSES[name])
    loss = LOSSES[name](*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for gradient in first:
        gradient.fill_(float("nan"))
    for gradient, true in zip(torch.autograd.grad(loss, leaves), truth):
        torch.testing.assert_close(gradient, true, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_that_meet_others(name):
    """The loss twice in one sum, two losses of one batch, accumulation over steps, and leaves further up."""
    leaves, (d_query, d_target) = batch(), expected(LOSSES[name])
    loss = LOSSES[name](*leaves)
    (loss + 2 * loss + LOSSES[name](*leaves)).backward()
    LOSSES[name](*leaves).backward()
    for leaf, true in zip(leaves, (d_query, d_target)):
        torch.testing.assert_close(leaf.grad, 5 * true, rtol=1e-13, atol=1e-16)
    weight = torch.eye(5, dtype=torch.float64, requires_grad=True)
    query, target = (leaf.detach() for leaf in leaves)
    LOSSES[name](query @ weight, target @ weight).backward()
    torch.testing.assert_close(weight.grad, query.T @ d_query + target.T @ d_target, rtol=1e-12, atol=1e-14)


def test_one_tensor_on_both_sides():
    query, _ = batch()
    loss = info_nce(query, query, temperature=0.2)
    loss.backward()
    result = info_nce_value_and_grad(query.detach(), query.detach(), temperature=0.2)
    torch.testing.assert_close(query.grad, result.d_query + result.d_target, rtol=1e-13, atol=1e-16)


def test_low_precision_and_hooks(saved):
    """Tensors of another dtype, and saved tensors that were packed away in between."""
    leaves = batch(torch.bfloat16)
    result = info_nce_value_and_grad(*(leaf.detach() for leaf in leaves), temperature=0.2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        loss = info_nce(*leaves, temperature=0.2)
    loss.backward()
    torch.testing.assert_close(leaves[0].grad, result.d_query, rtol=0, atol=0)
    torch.testing.assert_close(leaves[1].grad, result.d_target, rtol=0, atol=0)
