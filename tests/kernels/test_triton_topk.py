"""Streaming top-k against a stable dense sort."""

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels.triton import configs  # noqa: E402
from contrastive_kernels.triton.topk import topk  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = configs.Tile(16, 16, 16, 4, 1) if torch.cuda.is_available() else configs.Tile(4, 16, 16, 4, 1)  # sorting is slow when interpreted


def dense(query, target, k, exclude=None):
    scores = query.double() @ target.double().T
    for row, gone in enumerate(() if exclude is None else exclude.tolist()):
        scores[row, [g for g in gone if g >= 0]] = float("-inf")
    scores = torch.nn.functional.pad(scores, (0, max(0, k - len(target))), value=float("-inf"))
    order = scores.sort(dim=1, descending=True, stable=True)
    values, indices = order.values[:, :k], order.indices[:, :k]
    return values, indices.masked_fill(values == float("-inf"), -1)


# one of each; k above M; k not a power of two; several tiles and shares, the last one ragged
@pytest.mark.parametrize("rows, columns, k, shares", [(1, 1, 1, 1), (3, 5, 7, 1), (5, 33, 3, 1), (2, 70, 5, 3), (4, 40, 16, 2)])
def test_against_dense_with_ties(rows, columns, k, shares):
    # small integers: exact in any precision, full of ties, negative scores and zeros of both signs
    query = torch.randint(-2, 3, (rows, 7), device=DEVICE).float()
    target = torch.randint(-2, 3, (columns, 7), device=DEVICE).float()
    scores, indices = topk(query, target, k, tile=SMALL, shares=shares)
    values, expected = dense(query, target, k)
    assert torch.equal(scores, values.float())
    assert torch.equal(indices, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input(dtype):
    query, target = torch.randint(-2, 3, (3, 32), device=DEVICE).to(dtype), torch.randint(-2, 3, (20, 32), device=DEVICE).to(dtype)
    scores, indices = topk(query, target, 4, tile=SMALL)
    values, expected = dense(query, target, 4)
    assert torch.equal(scores.double(), values) and torch.equal(indices, expected)


def test_exclude():
    query, target = torch.randn(4, 16, device=DEVICE), torch.randn(24, 16, device=DEVICE)
    exclude = dense(query, target, 3)[1]  # exactly the best ones
    exclude[2] = -1
    scores, indices = topk(query, target, 4, exclude=exclude, tile=SMALL, shares=2)
    values, expected = dense(query, target, 4, exclude)
    torch.testing.assert_close(scores, values.float())
    assert torch.equal(indices, expected)


def test_everything_excluded_and_empty():
    query, target = torch.randn(2, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    scores, indices = topk(query, target, 2, exclude=torch.arange(3, device=DEVICE).expand(2, 3), tile=SMALL)
    assert (scores == float("-inf")).all() and (indices == -1).all()
    scores, indices = topk(query, target[:0], 2)
    assert (scores == float("-inf")).all() and (indices == -1).all()


def test_refuses_large_k():
    with pytest.raises(ValueError, match="1 to 128"):
        topk(torch.zeros(1, 4, device=DEVICE), torch.zeros(1, 4, device=DEVICE), 1000)
