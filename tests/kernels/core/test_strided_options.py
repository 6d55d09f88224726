"""Options that lie in memory with gaps (a column of a table, every second entry) give what contiguous ones give."""

import pytest
import torch

from contrastive_kernels import info_nce_value_and_grad, last_token_pool, sigmoid_loss, topk_similarity
from tests.kernels.helpers.sampling import Case, random_sets


def column_of_a_table(x):
    """What lies between differs from every entry, so that reading it shows."""
    other = ~x if x.dtype == torch.bool else x + 1
    return torch.stack([other, x, other], -1)[..., 1]


def every_second(x):
    other = ~x if x.dtype == torch.bool else x + 1
    return torch.stack([x, other], 1).flatten(0, 1)[::2]


STRIDES = [column_of_a_table, every_second]
SETS = [
    ("target_ids",),
    ("target_mask", "query_mask"),
    ("positives", "target_ids", "symmetric", "query_ids"),
    ("own_negatives_only", "hard_with_ids"),
    ("packed_hard", "weight"),
    ("matryoshka", "target_ids", "query_mask", "weight"),
    ("target_ids", "target_mask", "symmetric"),
    *random_sets(20, seed=31),
]


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("names", SETS, ids=" ".join)
def test_info_nce(names, stride):
    names = tuple(name for name in names if name != "none")
    case = Case(6)
    options = case.options(names)
    strided = {k: stride(v) if isinstance(v, torch.Tensor) and v.dim() else v for k, v in options.items()}
    assert any(isinstance(v, torch.Tensor) and v.dim() and not v.is_contiguous() for v in strided.values()) or not any(
        isinstance(v, torch.Tensor) and v.dim() for v in options.values()
    )
    ours, plain = (info_nce_value_and_grad(case.query, case.target, return_stats=True, **given) for given in (strided, options))
    for name in ("loss", "d_query", "d_target", "d_hard_negatives", "d_temperature"):
        # norms of strided hard negatives are summed in another order: an ulp of float64
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(vars(ours.stats), vars(plain.stats), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("stride", STRIDES)
def test_the_others(stride):
    case = Case(7)
    options = {**case.options(("target_ids", "query_mask", "target_mask", "weight", "positives"))}
    del options["temperature"]
    strided = {k: stride(v) for k, v in options.items()}
    ours, plain = (sigmoid_loss(case.query, case.target, scale=4.0, bias=-1.0, **given) for given in (strided, options))
    assert torch.equal(ours, plain)
    exclude = torch.randint(-1, case.m - 1, (case.n, 3), generator=case.generator)
    target = case.target.nan_to_num()
    query = case.query.nan_to_num()
    for a, b in zip(*(topk_similarity(query, target, 4, exclude=given) for given in (stride(exclude), exclude))):
        assert torch.equal(a, b)
    hidden, mask, offsets = torch.randn(3, 5, 4), torch.randint(0, 2, (3, 5), generator=case.generator), torch.tensor([0, 2, 2, 5])
    assert torch.equal(last_token_pool(hidden, attention_mask=stride(mask.bool())), last_token_pool(hidden, attention_mask=mask.bool()))
    assert torch.equal(last_token_pool(hidden[0], cu_seqlens=stride(offsets)), last_token_pool(hidden[0], cu_seqlens=offsets))
