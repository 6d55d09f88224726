"""The selection inside `topk_similarity`: block maxima first, exact with ties."""

import pytest
import torch

from contrastive_kernels import topk_similarity
from contrastive_kernels.topk import merge_tile


@pytest.mark.parametrize("rows, columns, k", [(5, 1, 1), (3, 7, 10), (4, 1000, 1), (7, 4097, 10), (3, 65536, 100), (2, 333, 5)])
def test_selection_equals_a_stable_sort(rows, columns, k):
    """Many ties (six values), none, and rows with nothing but -inf; 4097 and 333 leave a tail beside the blocks."""
    for values in (torch.randint(0, 6, (rows, columns)).float(), torch.randn(rows, columns), torch.full((rows, columns), float("-inf"))):
        expected = values.sort(dim=1, descending=True, stable=True)
        for cut in (0, columns // 3):  # in one tile, and in two: the second must not take the place of equals in the first
            ours, where = torch.full((rows, k), float("-inf")), torch.full((rows, k), -1)
            if cut:
                merge_tile(ours, where, values[:, :cut], 0)
            merge_tile(ours, where, values[:, cut:], cut)
            width = min(k, columns)
            assert torch.equal(ours[:, :width], expected.values[:, :k])
            real = ~torch.isneginf(ours[:, :width])
            assert torch.equal(where[:, :width][real], expected.indices[:, :k][real])


def test_excluded_and_tied_targets_over_many_tiles():
    query, target = torch.randint(-1, 2, (9, 4)).float(), torch.randint(-1, 2, (5000, 4)).float()
    exclude = torch.randint(-1, 5000, (9, 6))
    scores, indices = topk_similarity(query, target, 12, exclude=exclude, workspace_mib=0.1)
    full = query @ target.T
    for i, row in enumerate(exclude):
        full[i, row[row >= 0]] = float("-inf")
    expected = full.sort(dim=1, descending=True, stable=True)
    assert torch.equal(scores, expected.values[:, :12]) and torch.equal(indices, expected.indices[:, :12])
