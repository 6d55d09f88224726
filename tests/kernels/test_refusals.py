"""Bad input is a ValueError that names the argument, says what was expected and what came; nothing is silently ignored."""

import pytest
import torch

from contrastive_kernels import InfoNCELoss, info_nce, info_nce_value_and_grad, last_token_pool, pooled_info_nce, topk_similarity

N, M, D = 4, 8, 3


def ints(*values):
    return torch.tensor(values)


GOOD = {"query": torch.randn(N, D), "target": torch.randn(M, D)}
BAD = {
    "wrong rank": ({"query": torch.randn(N, 2, D)}, "query: expected 2 dimensions"),
    "a vector": ({"target": torch.randn(D)}, "target: expected 2 dimensions"),
    "mismatched D": ({"target": torch.randn(M, D + 1)}, "got query D=3 and target D=4"),
    "devices differ": ({"target": torch.randn(M, D, device="meta")}, "one device.*cpu.*meta"),
    "dtypes differ": ({"target": torch.randn(M, D).bfloat16()}, "one dtype.*float32.*bfloat16"),
    "integers": ({"query": torch.ones(N, D, dtype=torch.int64)}, "floating-point.*int64"),
    "empty batch": ({"query": torch.randn(0, D)}, "at least one row"),
    "empty width": ({"query": torch.randn(N, 0), "target": torch.randn(M, 0)}, "at least one row and column"),
    "more queries than targets": ({"query": torch.randn(9, D)}, "pass positives"),
    "positives too large": ({"positives": ints(0, 1, 2, 8)}, "from 0 to 7.*got 8 at 3"),
    "positives below zero": ({"positives": ints(0, -1, 2, 3)}, "got -1 at 1"),
    "positives of another ignore_index": ({"positives": ints(0, -100, 2, 3), "ignore_index": -1}, "got -100 at 1"),
    "positives too short": ({"positives": ints(0, 1)}, r"positives: expected shape \(4,\)"),
    "positives in float": ({"positives": torch.zeros(N)}, "positives: expected torch.int64"),
    "positives as a list": ({"positives": [0, 1, 2, 3]}, "positives: expected a tensor"),
    "temperature zero": ({"temperature": 0.0}, "temperature: expected a number above 0"),
    "temperature below zero": ({"temperature": -0.1}, "got -0.1"),
    "temperature NaN": ({"temperature": float("nan")}, "temperature"),
    "temperature tensor zero": ({"temperature": torch.tensor(0.0)}, "temperature: expected a number above 0"),
    "temperature vector": ({"temperature": torch.ones(2)}, "temperature: expected a 0-d tensor"),
    "NaN in ids": ({"target_ids": torch.full((M,), float("nan"))}, "target_ids: expected torch.int64.*NaN"),
    "NaN in query ids": ({"query_ids": torch.full((N,), float("nan"))}, "query_ids: expected torch.int64.*NaN"),
    "mask of numbers": ({"target_mask": torch.ones(M)}, "target_mask: expected torch.bool"),
    "mask of another length": ({"query_mask": torch.ones(M, dtype=torch.bool)}, r"query_mask: expected shape \(4,\)"),
    "weight not finite": ({"weight": torch.tensor([1.0, 2.0, float("nan"), 1.0])}, "weight: expected finite"),
    "K of zero": ({"hard_negatives": torch.randn(N, 0, D)}, "K of at least 1"),
    "hard negatives of other rows": ({"hard_negatives": torch.randn(N + 1, 2, D)}, "hard_negatives: expected"),
    "packed without offsets": ({"hard_negatives": torch.randn(7, D)}, "needs hard_offsets"),
    "offsets past the end": ({"hard_negatives": torch.randn(5, D), "hard_offsets": ints(0, 1, 2, 3, 6)}, "hard_offsets.*H=5"),
    "offsets that fall": ({"hard_negatives": torch.randn(5, D), "hard_offsets": ints(0, 3, 2, 4, 5)}, "steps below 0"),
    "hard negatives in another dtype": ({"hard_negatives": torch.randn(N, 2, D).double()}, "hard_negatives: expected the queries' dtype"),
    "hard ids of another shape": ({"hard_negatives": torch.randn(N, 2, D), "hard_ids": torch.zeros(N, 3).long(), "target_ids": torch.zeros(M).long()}, "hard_ids: expected shape"),
    "hard ids alone": ({"hard_ids": torch.zeros(N, 2).long()}, "needs hard_negatives"),
    "offsets alone": ({"hard_offsets": ints(0, 1, 2, 3, 4)}, "needs hard_negatives"),
    "Matryoshka wider than D": ({"matryoshka_dims": (2, 5)}, "from 1 to D=3, got 5"),
    "Matryoshka weights alone": ({"matryoshka_weights": (1.0,)}, "needs matryoshka_dims"),
    "Matryoshka weights of another length": ({"matryoshka_dims": (1, 2), "matryoshka_weights": (1.0,)}, "matryoshka_weights: expected 2"),
    "Matryoshka without widths": ({"matryoshka_dims": ()}, "matryoshka_dims"),
    "hardness below zero": ({"hardness": -1.0}, "hardness: expected 0 or more"),
    "hardness scope": ({"hardness_scope": "some"}, "hardness_scope: expected one of"),
    "label smoothing of one": ({"label_smoothing": 1.0}, "label_smoothing: expected"),
    "reduction": ({"reduction": "avg"}, "reduction: expected one of"),
    "exchange": ({"exchange": "mesh"}, "exchange: expected one of"),
    "backend": ({"backend": "cuda"}, "backend: expected one of"),
    "workspace": ({"workspace_mib": 0}, "workspace_mib"),
    "no room for a row": ({"workspace_mib": 1e-5}, "room for one row"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("function", [info_nce, info_nce_value_and_grad])
def test_bad_input(function, name):
    change, message = BAD[name]
    given = {**GOOD, **change}
    with pytest.raises(ValueError, match=message):
        function(given.pop("query"), given.pop("target"), **given)


def test_options_that_do_not_exist():
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        info_nce(**GOOD, temprature=0.1)
    with pytest.raises(TypeError, match="did you mean 'symmetric'"):
        InfoNCELoss(symetric=True)


def test_value_and_grad_only():
    with pytest.raises(ValueError, match="'none'"):
        info_nce_value_and_grad(**GOOD, reduction="none")
    with pytest.raises(ValueError, match="wrt: expected names of"):
        info_nce_value_and_grad(**GOOD, wrt=("hard_negatives",))


def test_a_second_derivative_raises():
    query = GOOD["query"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(info_nce(query, GOOD["target"]), query, create_graph=True)


HIDDEN, MASK = torch.randn(2, 5, D), torch.ones(2, 5)


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "neither"),
        ({"attention_mask": MASK, "cu_seqlens": ints(0, 2)}, "both"),
        ({"attention_mask": MASK[:, :4]}, "attention_mask"),
        ({"cu_seqlens": ints(0, 5)}, r"packed \(T, D\)"),
        ({"hidden": HIDDEN[0], "cu_seqlens": ints(5)}, "cu_seqlens"),
        ({"hidden": HIDDEN[0], "cu_seqlens": torch.tensor([0.0, float("nan")])}, "cu_seqlens"),
        ({"hidden": HIDDEN.long(), "attention_mask": MASK}, "floating-point"),
        ({"attention_mask": MASK.to("meta")}, "meta"),
    ],
)
def test_pooling(given, message):
    with pytest.raises(ValueError, match=message):
        last_token_pool(**{"hidden": HIDDEN, **given})


def test_pooled_loss_names_the_side():
    with pytest.raises(ValueError, match="target_hidden: expected one of target_attention_mask"):
        pooled_info_nce(HIDDEN, HIDDEN, query_attention_mask=MASK)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"query": torch.randn(3)}, "query"),
        ({"target": torch.randn(5, D + 1)}, "same width"),
        ({"target": torch.randn(5, D).bfloat16()}, "one dtype"),
        ({"target": torch.randn(5, D, device="meta")}, "one device"),
        ({"k": 0}, "k: expected 1 or more"),
        ({"exclude": torch.zeros(9, 1).long()}, "exclude: expected"),
        ({"exclude": torch.full((N, 1), float("nan"))}, "exclude: expected"),
        ({"workspace_mib": 0}, "workspace_mib"),
    ],
)
def test_topk(given, message):
    with pytest.raises(ValueError, match=message):
        topk_similarity(**{**GOOD, "k": 2, **given})
