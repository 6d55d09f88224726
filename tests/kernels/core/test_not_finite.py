"""A loss that saw a NaN is NaN: in a query, a positive, a candidate that is nobody's positive, or a hard negative, whatever the options."""

import math

import pytest
import torch

from contrastive_kernels import info_nce, info_nce_value_and_grad, sigmoid_loss

ROWS, WIDTH = 6, 32
OPTIONS = {
    "plain": {},
    "normalize": {"normalize": True},
    "validate": {"normalize": True, "validate": True},
    "temperature": {"temperature": torch.tensor(0.5), "normalize": True},
    "symmetric": {"symmetric": True, "normalize": True},
    "smoothing": {"label_smoothing": 0.1, "normalize": True},
    "query negatives": {"query_negatives": True},
    "target negatives": {"target_negatives": True},
    "ids": {"target_ids": torch.arange(2 * ROWS) % 5},
    "margin": {"mask_margin": 0.1, "normalize": True},
    "hardness": {"hardness": 0.5, "normalize": True},
    "levels": {"matryoshka_dims": (16, 32), "normalize": True},
}


def rows(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))), dim=-1)


def given(name, index, whole):
    """Matrices of which one row, or one number of it, is NaN; target 3 is nobody's positive."""
    matrices = {"query": rows(ROWS, WIDTH), "target": rows(2 * ROWS, WIDTH), "hard_negatives": rows(ROWS, 2, WIDTH)}
    matrices[name][index].view(-1)[: None if whole else 1] = math.nan
    return matrices


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("whole", [True, False], ids=["a row", "a number"])
@pytest.mark.parametrize("name, index", [("query", 1), ("target", 2), ("target", 3), ("hard_negatives", 1)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_loss_that_saw_a_nan_is_nan(options, name, index, whole, backend):
    matrices = given(name, index, whole)
    hard = {} if name != "hard_negatives" else {"hard_negatives": matrices["hard_negatives"]}
    loss = info_nce(matrices["query"], matrices["target"], backend=backend, **hard, **options)
    assert math.isnan(loss)
    # and with gradients, which goes another way
    assert math.isnan(info_nce_value_and_grad(matrices["query"], matrices["target"], backend=backend, **hard, **options).loss)


@pytest.mark.parametrize("name, index", [("query", 1), ("target", 2), ("target", 3)])
def test_a_sigmoid_loss_that_saw_a_nan_is_nan(name, index):
    matrices = given(name, index, False)
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    assert math.isnan(sigmoid_loss(matrices["query"], matrices["target"], scale=scale, bias=bias))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_that_are_left_out_may_hold_anything(backend):
    matrices = given("target", 3, True)
    mask = torch.arange(2 * ROWS) != 3
    clean = matrices["target"].clone()
    clean[3] = 0
    loss = info_nce(matrices["query"], matrices["target"], target_mask=mask, backend=backend)
    assert loss == info_nce(matrices["query"], clean, target_mask=mask, backend=backend) and math.isfinite(loss)
