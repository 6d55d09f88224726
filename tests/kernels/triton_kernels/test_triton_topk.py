"""Streaming top-k against a stable dense sort."""

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels.triton import configs
from contrastive_kernels.triton.kernels import topk as topk_file
from contrastive_kernels.triton.kernels.topk import topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = configs.Tile(16, 16, 16, 4, 1)
RESIDENT = configs.Tile(16, 16, 16, 4, 1, resident=True)


def dense(query, target, k, exclude=None):
    scores = query.double() @ target.double().T
    for row, gone in enumerate(() if exclude is None else exclude.tolist()):
        scores[row, [g for g in gone if g >= 0]] = float("-inf")
    scores = torch.nn.functional.pad(scores, (0, max(0, k - len(target))), value=float("-inf"))
    order = scores.sort(dim=1, descending=True, stable=True)
    values, indices = order.values[:, :k], order.indices[:, :k]
    return values, indices.masked_fill(values == float("-inf"), -1)


# one of each; k above M; k not a power of two; several tiles and splits, the last one ragged
@pytest.mark.parametrize("tile", [SMALL, RESIDENT], ids=["read again", "resident"])
@pytest.mark.parametrize(
    "rows, columns, k, splits", [(1, 1, 1, 1), (3, 5, 9, 1), (17, 33, 3, 1), (5, 130, 5, 3), (20, 100, 16, 2), (2, 70, 40, 1)]
)
def test_against_dense_with_ties(rows, columns, k, splits, tile):
    # small integers: exact in any precision, full of ties, negative scores and zeros of both signs
    query = torch.randint(-2, 3, (rows, 37), device=DEVICE).float()  # three pieces of BLOCK_K, the last one ragged
    target = torch.randint(-2, 3, (columns, 37), device=DEVICE).float()
    scores, indices = topk(query, target, k, tile=tile, splits=splits)
    values, expected = dense(query, target, k)
    assert torch.equal(scores, values.float())
    assert torch.equal(indices, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16] + ([torch.float64] if DEVICE == "cpu" else []))
def test_low_precision_input(dtype):
    query, target = torch.randint(-2, 3, (3, 32), device=DEVICE).to(dtype), torch.randint(-2, 3, (20, 32), device=DEVICE).to(dtype)
    scores, indices = topk(query, target, 4, tile=SMALL)
    values, expected = dense(query, target, 4)
    assert torch.equal(scores.double(), values) and torch.equal(indices, expected)


def test_two_types_meet_in_the_wider(monkeypatch):
    query, target = torch.randn(3, 32, device=DEVICE).to(torch.bfloat16), torch.randn(20, 32, device=DEVICE)
    if DEVICE == "cpu":  # a GPU's compiler refuses a product of two types, the interpreter widens both: look at what is launched
        kernel, launched = topk_file._topk_kernel, []

        class Kernel:
            def __getitem__(self, grid):
                return lambda x, y, *rest, **options: launched.append({x.dtype, y.dtype}) or kernel[grid](x, y, *rest, **options)

        monkeypatch.setattr(topk_file, "_topk_kernel", Kernel())
    for a, b in ((query, target), (target, query)):
        scores, indices = topk(a, b, 2, tile=SMALL)
        values, expected = dense(a.float(), b.float(), 2)
        torch.testing.assert_close(scores, values.float())
        assert torch.equal(indices, expected)
    assert DEVICE != "cpu" or launched == [{torch.float32}] * 2


def test_ascending_scores_replace_every_slot():
    # each target beats all before it: the worst case of the selection, every tile taken apart
    query, target = torch.ones(3, 1, device=DEVICE), torch.arange(60.0, device=DEVICE)[:, None]
    scores, indices = topk(query, target, 5, tile=SMALL)
    assert indices.tolist() == [[59, 58, 57, 56, 55]] * 3 and scores[0].tolist() == [59.0, 58.0, 57.0, 56.0, 55.0]


def test_exclude():
    query, target = torch.randn(4, 16, device=DEVICE), torch.randn(24, 16, device=DEVICE)
    exclude = dense(query, target, 3)[1]  # exactly the best ones
    exclude[2] = -1
    scores, indices = topk(query, target, 4, exclude=exclude, tile=SMALL, splits=2)
    values, expected = dense(query, target, 4, exclude)
    torch.testing.assert_close(scores, values.float())
    assert torch.equal(indices, expected)


@pytest.mark.parametrize("tile", [SMALL, RESIDENT], ids=["read again", "resident"])
def test_excluded_targets_give_way_wherever_they_stand(tile):
    """They are looked up when they would enter: before, between and after those that stay, many in one tile, each of them the best."""
    query, target = torch.ones(5, 1, device=DEVICE), torch.arange(64.0, 0.0, -1.0, device=DEVICE)[:, None]
    exclude = torch.tensor([[0, 1, 2, 3], [63, 62, -1, -1], [1, 1, 3, 5], [-1] * 4, [0, 20, 40, 60]], device=DEVICE)
    for order in (torch.arange(64), torch.arange(63, -1, -1), torch.randperm(64)):
        place = torch.empty(64, dtype=torch.int64).scatter_(0, order, torch.arange(64)).to(DEVICE)
        here = torch.where(exclude < 0, exclude, place[exclude.clamp_min(0)])
        scores, indices = topk(query, target[order.to(DEVICE)], 3, exclude=here, tile=tile, splits=2)
        values, expected = dense(query, target[order.to(DEVICE)], 3, here)
        assert torch.equal(scores, values.float()) and torch.equal(indices, expected)


def test_shares_fill_whole_waves():
    # an H100: 132 multiprocessors, two blocks each; 157 tiles of rows, 15,625 of columns: 785 programs are 2.97 waves
    assert configs.topk_splits(264, 157, 15_625) == 5
    assert 250 <= configs.topk_splits(264, 1, 15_625) <= 264  # one query has the whole GPU
    assert configs.topk_splits(264, 1, 3) <= 3 and configs.topk_splits(1, 7, 1) == 1
    for tiles_r in (1, 40, 157, 1000):
        programs = tiles_r * configs.topk_splits(264, tiles_r, 15_625)
        assert -(-programs // 264) * 264 / programs < 1.1  # of the time, idle


def test_expected_looks_are_those_of_random_targets():
    """The cost model's expectation against counting: a tile is looked through as often as the row with the most newcomers has some."""
    from contrastive_kernels.roofline.topk import looks

    generator, rows, columns, kept, targets = torch.Generator().manual_seed(0), 16, 16, 4, 2048
    counted = 0
    for _ in range(3):
        scores = torch.rand(rows, targets, generator=generator)
        lists = torch.full((rows, kept), -1.0)
        for start in range(0, targets, columns):
            tile = scores[:, start : start + columns]
            both = torch.cat([lists, tile], 1).topk(kept, 1)
            # a newcomer may leave again within its tile: at most this many looks, at least those that stay
            counted += int((both.indices >= kept).sum(1).max())
            lists = both.values
    assert 0.8 <= looks(rows, columns, kept, targets) * 3 / counted <= 1.6


def test_everything_excluded_and_empty():
    query, target = torch.randn(2, 8, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    scores, indices = topk(query, target, 2, exclude=torch.arange(3, device=DEVICE).expand(2, 3), tile=SMALL)
    assert (scores == float("-inf")).all() and (indices == -1).all()
    scores, indices = topk(query, target[:0], 2)
    assert (scores == float("-inf")).all() and (indices == -1).all()


def test_refuses_large_k_and_columns_beyond_32_bits():
    with pytest.raises(ValueError, match="at most 2147483519 columns .* got 2147483648"):
        topk(torch.zeros(1, 4, device=DEVICE), torch.zeros(1, 4, device=DEVICE).expand(1 << 31, 4), 3)
    with pytest.raises(ValueError, match="1 to 128"):
        topk(torch.zeros(1, 4, device=DEVICE), torch.zeros(1, 4, device=DEVICE), 1000)


def test_public_function():
    from contrastive_kernels import topk_similarity

    query, target = torch.randn(4, 9, device=DEVICE), torch.randn(30, 9, device=DEVICE)
    ours, theirs = (topk_similarity(query, target, 3, backend=b) for b in ("triton", "torch"))
    torch.testing.assert_close(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    with pytest.raises(ValueError, match="k=500"):
        topk_similarity(query, target, 500, backend="triton")
