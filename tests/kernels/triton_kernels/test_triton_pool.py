"""Last-token gather and normalisation, against float64 and through autograd."""

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels.triton.kernels.pool import last_token_index, pool_backward, pool_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def masks():
    right = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    return {
        "right": right,
        "left": right.flip(1),
        "bool": right.bool(),
        "none": torch.zeros(3, 4, dtype=torch.int32),
        "float": right.float(),
        "transposed": right.T.contiguous().T,
    }


@pytest.mark.parametrize("name", masks())
def test_index_of_either_padding_side(name):
    mask = masks()[name].to(DEVICE)
    places = torch.where(mask != 0, torch.arange(4, device=DEVICE), -1).amax(1)
    expected = torch.where(places < 0, -1, places + 4 * torch.arange(3, device=DEVICE))
    assert torch.equal(last_token_index(attention_mask=mask), expected)


def test_index_of_long_sequences():
    mask = torch.zeros(2, 2500, dtype=torch.int64, device=DEVICE)  # longer than two blocks
    mask[0, :1500], mask[1, 2499] = 1, 1
    assert last_token_index(attention_mask=mask).tolist() == [1499, 4999]


class Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, index, normalize):
        out, inverse = pool_forward(hidden, index, normalize=normalize)
        ctx.save_for_backward(hidden, index, inverse)
        ctx.normalize = normalize
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, index, inverse = ctx.saved_tensors
        rows = pool_backward(grad, hidden, index, inverse, normalize=ctx.normalize)
        there = index >= 0
        flat = torch.zeros_like(hidden).view(-1, hidden.shape[-1])
        return flat.index_copy_(0, index[there], rows[there]).view_as(hidden), None, None


@pytest.mark.skipif(DEVICE != "cpu", reason="float64 under the interpreter")
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize):
    hidden = torch.randn(3, 2, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    index = torch.tensor([1, -1, 4], device=DEVICE)
    assert torch.autograd.gradcheck(lambda h: Pool.apply(h, index, normalize), (hidden,))


# width 1; odd; one above the block; a real model's, in every storage type
@pytest.mark.parametrize(
    "dtype, width",
    [
        (torch.float64 if DEVICE == "cpu" else torch.float32, 1),
        (torch.float32, 33),
        (torch.float32, 1025),
        (torch.bfloat16, 1536),
        (torch.float16, 64),
    ],
)
def test_against_float64(dtype, width):
    hidden = torch.randn(40, width, device=DEVICE).to(dtype)[::2]  # strided rows
    hidden[3] = 0  # no direction
    index = torch.tensor([0, 3, 19, -1], device=DEVICE)
    grad = torch.randn(4, width, device=DEVICE).to(dtype)
    out, inverse = pool_forward(hidden, index)
    rows = pool_backward(grad, hidden, index, inverse)
    picked = hidden[index.clamp(min=0)].double() * (index >= 0)[:, None]
    norm = picked.norm(dim=1, keepdim=True)
    unit = picked / norm.clamp(min=1e-12)
    truth = torch.where(norm > 0, (grad.double() - (grad.double() * unit).sum(1, keepdim=True) * unit) / norm.clamp(min=1e-12), 0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), unit, rtol=4 * eps, atol=eps * 1e-2)
    torch.testing.assert_close(
        rows.double(), truth, rtol=8 * eps, atol=8 * eps * (grad.double() / norm.clamp(min=1e-12))[norm[:, 0] > 0].abs().max().item()
    )
    assert not out[1].any() and not out[3].any() and not rows[1].any() and not rows[3].any()


@pytest.mark.parametrize("normalize", [True, False])
def test_nothing_comes_through_to_a_sample_without_a_token(normalize):
    hidden, index = torch.full((3, 5), float("nan"), device=DEVICE), torch.tensor([-1, 1], device=DEVICE)
    hidden[1] = torch.arange(5.0)
    out, inverse = pool_forward(hidden, index, normalize=normalize)
    rows = pool_backward(torch.tensor([[float("nan")] * 5, [1.0] * 5], device=DEVICE), hidden, index, inverse, normalize=normalize)
    assert not out[0].any() and not rows[0].any() and rows[1].isfinite().all()


def test_empty_batch():
    hidden = torch.randn(0, 4, device=DEVICE)
    out, _ = pool_forward(hidden, torch.empty(0, dtype=torch.int64, device=DEVICE))
    assert out.shape == (0, 4)


@pytest.mark.parametrize("normalize", [True, False])
def test_public_function(normalize):
    from contrastive_kernels import last_token_pool

    mask = masks()["right"].to(DEVICE)
    dtype = torch.float64 if DEVICE == "cpu" else torch.float32
    hidden = torch.randn(3, 4, 6, device=DEVICE, dtype=dtype, requires_grad=True)
    out = [last_token_pool(hidden, attention_mask=mask, normalize=normalize, backend=b) for b in ("triton", "torch")]
    torch.testing.assert_close(*out)
    cotangent = torch.randn_like(out[0])
    torch.testing.assert_close(*(torch.autograd.grad(o, hidden, cotangent)[0] for o in out))
