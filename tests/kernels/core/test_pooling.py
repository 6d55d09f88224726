"""Pooling and the loss from hidden states against their definitions in float64: padded, packed, samples without a token or a direction."""

import pytest
import torch

from contrastive_kernels import last_token_pool, pooled_info_nce
from contrastive_kernels.reference import last_token_pool_reference, pooled_info_nce_reference

N, L, D = 6, 4, 8
MASK = torch.tensor(
    [[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]
)  # one without a token, one with a hole
OFFSETS = torch.tensor([0, 3, 3, 8, 12, 20, 22])  # one without a token, two behind the last sample


def hidden_states(zero: bool = False):
    hidden = torch.randn(N, L, D, dtype=torch.float64)
    if zero:
        hidden[2, 3] = 0  # the last token of a row padded on the left, and of a packed sample
        hidden[2, 0] = 0  # of one padded on the right
    return hidden


LAYOUTS = {
    "padded": lambda h: (h, {"attention_mask": MASK}),
    "bool": lambda h: (h, {"attention_mask": MASK.bool()}),
    "float": lambda h: (h, {"attention_mask": MASK.float()}),
    "left": lambda h: (h, {"attention_mask": MASK.flip(1)}),
    "strided": lambda h: (h.transpose(0, 1).contiguous().transpose(0, 1), {"attention_mask": MASK.T.contiguous().T}),
    "packed": lambda h: (h.flatten(0, 1), {"cu_seqlens": OFFSETS}),
    "packed int32": lambda h: (h.flatten(0, 1), {"cu_seqlens": OFFSETS.int()}),
}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_its_definition(layout, normalize, zero):
    hidden, how = LAYOUTS[layout](hidden_states(zero))
    hidden.requires_grad_()
    ours, truth = (f(hidden, normalize=normalize, **how) for f in (last_token_pool, last_token_pool_reference))
    torch.testing.assert_close(ours, truth)
    cotangent = torch.randn(N, D, dtype=torch.float64)
    gradients = [torch.autograd.grad(result, hidden, cotangent)[0] for result in (ours, truth)]
    torch.testing.assert_close(*gradients)
    assert int((ours == 0).all(1).sum()) == 1 + zero
    if zero and normalize:  # no direction, no gradient: 1 / eps would be one of 1e12
        assert gradients[1].abs().max() < 1e3


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_gradcheck(layout):
    hidden, how = LAYOUTS[layout](hidden_states()[..., :3])
    assert torch.autograd.gradcheck(lambda h: last_token_pool(h, **how), (hidden.requires_grad_(),))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "shape, how", [((3, 0, D), {"attention_mask": torch.ones(3, 0)}), ((0, D), {"cu_seqlens": torch.zeros(4, dtype=torch.int64)})]
)
def test_no_token_at_all(shape, how, backend):
    pytest.importorskip("triton") if backend == "triton" else None
    hidden = torch.zeros(shape, requires_grad=True)
    out = last_token_pool(hidden, backend=backend, **how)
    assert out.shape == (3, D) and not out.any()
    out.sum().backward()
    assert hidden.grad.shape == shape


def test_what_lies_in_other_rows_does_not_matter():
    """Hidden states of padding may hold anything, in the first row too, which stands in for samples without a token."""
    hidden = hidden_states()
    hidden[4] = float("nan")
    hidden[0, 0] = float("inf")
    hidden.requires_grad_()
    out = last_token_pool(hidden, attention_mask=MASK)
    assert out.isfinite().all() and not out[4].any()
    out.backward(torch.where(torch.arange(N)[:, None] == 4, float("nan"), torch.ones(N, D, dtype=torch.float64)))
    assert hidden.grad.isfinite().all() and not hidden.grad[4].any() and not hidden.grad[0, 0].any() and hidden.grad[0, 3].any()


def test_a_second_derivative_raises():
    hidden = hidden_states().requires_grad_()
    with pytest.raises(RuntimeError, match="last_token_pool has no second derivative"):
        torch.autograd.grad(last_token_pool(hidden, attention_mask=MASK).sum(), hidden, create_graph=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": True, "temperature": 0.2},
        {"normalize": False, "temperature": 3.0},
        {"matryoshka_dims": (3, D), "reduction": "none"},
    ],
)
@pytest.mark.parametrize(
    "query_layout, target_layout", [("padded", "left"), ("packed", "padded"), ("packed int32", "packed"), ("strided", "float")]
)
def test_the_loss_from_hidden_states_equals_its_definition(query_layout, target_layout, options):
    (query, of_query), (target, of_target) = LAYOUTS[query_layout](hidden_states(True)), LAYOUTS[target_layout](hidden_states(True))
    query.requires_grad_(), target.requires_grad_()
    given = {f"query_{name}": value for name, value in of_query.items()} | {f"target_{name}": value for name, value in of_target.items()}
    ours, truth = (f(query, target, **given, **options) for f in (pooled_info_nce, pooled_info_nce_reference))
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)
    cotangent = 0.5 + torch.rand_like(truth)
    for a, b in zip(torch.autograd.grad(ours, (query, target), cotangent), torch.autograd.grad(truth, (query, target), cotangent)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
