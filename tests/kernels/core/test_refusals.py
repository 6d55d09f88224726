"""Bad input is a ValueError that names the argument, says what was expected, what came, and the mend; nothing is silently ignored."""

import ast
import contextlib
import re

import pytest
import torch

from contrastive_kernels import (
    InfoNCELoss,
    info_nce,
    info_nce_value_and_grad,
    last_token_pool,
    pooled_info_nce,
    sigmoid_loss,
    topk_similarity,
)
from tests.helpers.repository import ROOT

N, M, D = 4, 8, 3


def ints(*values):
    return torch.tensor(values)


@contextlib.contextmanager
def refused(message):
    """A ValueError that matches `message` and has its three parts."""
    with pytest.raises(ValueError, match=message) as caught:
        yield
    assert re.search(r"expected .+ got .+; .+", str(caught.value), re.DOTALL), f"not expected, got, mend: {caught.value}"


GOOD = {"query": torch.randn(N, D), "target": torch.randn(M, D)}
BAD = {
    "wrong rank": ({"query": torch.randn(N, 2, D)}, "query: expected 2 dimensions"),
    "a vector": ({"target": torch.randn(D)}, "target: expected 2 dimensions"),
    "positives first, fewer negatives": ({"target": torch.randn(7, D)}, "positives: expected M targets to be a multiple .* pass positives"),
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
    "temperature matrix": ({"temperature": torch.ones(4, 1)}, "temperature: expected a 0-d, .1,. or .N,. tensor"),
    "temperatures with hardness": ({"temperature": torch.ones(4), "hardness": 1.0}, "hardness: expected one temperature for all rows"),
    "temperature vector": ({"temperature": torch.ones(2)}, "temperature: expected one number, or 4 of them, one a query"),
    "NaN in ids": ({"target_ids": torch.full((M,), float("nan"))}, "target_ids: expected torch.int64.*NaN"),
    "NaN in query ids": ({"query_ids": torch.full((N,), float("nan")), "symmetric": True}, "query_ids: expected torch.int64.*NaN"),
    "mask of numbers": ({"target_mask": torch.ones(M)}, "target_mask: expected torch.bool"),
    "mask of another length": ({"query_mask": torch.ones(M, dtype=torch.bool)}, r"query_mask: expected shape \(4,\)"),
    "weight not finite": ({"weight": torch.tensor([1.0, 2.0, float("nan"), 1.0])}, "weight: expected finite"),
    "K of zero": ({"hard_negatives": torch.randn(N, 0, D)}, "K of at least 1"),
    "hard negatives of other rows": ({"hard_negatives": torch.randn(N + 1, 2, D)}, "hard_negatives: expected"),
    "packed without offsets": ({"hard_negatives": torch.randn(7, D)}, "needs hard_offsets"),
    "offsets past the end": ({"hard_negatives": torch.randn(5, D), "hard_offsets": ints(0, 1, 2, 3, 6)}, "hard_offsets.*H=5"),
    "offsets that fall": ({"hard_negatives": torch.randn(5, D), "hard_offsets": ints(0, 3, 2, 4, 5)}, "steps below 0"),
    "hard negatives in another dtype": ({"hard_negatives": torch.randn(N, 2, D).double()}, "hard_negatives: expected the queries' dtype"),
    "hard ids of another shape": (
        {"hard_negatives": torch.randn(N, 2, D), "hard_ids": torch.zeros(N, 3).long(), "target_ids": torch.zeros(M).long()},
        "hard_ids: expected shape",
    ),
    "hard ids alone": ({"hard_ids": torch.zeros(N, 2).long()}, "hard_ids: expected hard_negatives beside"),
    "hard ids without target ids": (
        {"hard_negatives": torch.randn(N, 2, D), "hard_ids": torch.zeros(N, 2).long()},
        "hard_ids: expected target_ids beside",
    ),
    "offsets alone": ({"hard_offsets": ints(0, 1, 2, 3, 4)}, "hard_offsets: expected hard_negatives beside"),
    "Matryoshka wider than D": ({"matryoshka_dims": (2, 5)}, "from 1 to D=3, got 5"),
    "Matryoshka weights alone": ({"matryoshka_weights": (1.0,)}, "expected matryoshka_dims beside"),
    "Matryoshka weights of another length": ({"matryoshka_dims": (1, 2), "matryoshka_weights": (1.0,)}, "matryoshka_weights: expected 2"),
    "Matryoshka without widths": ({"matryoshka_dims": ()}, "matryoshka_dims"),
    "hardness below zero": ({"hardness": -1.0}, "hardness: expected 0 or more"),
    "hardness scope": ({"hardness_scope": "some"}, "hardness_scope: expected one of"),
    "label smoothing of one": ({"label_smoothing": 1.0}, "label_smoothing: expected"),
    "reduction": ({"reduction": "avg"}, "reduction: expected one of"),
    "exchange": ({"exchange": "mesh"}, "exchange: expected one of"),
    "backend": ({"backend": "cuda"}, "backend: expected one of"),
    "workspace": ({"workspace_mib": 0}, "workspace_mib"),
    "workspace of words": ({"workspace_mib": "256"}, "workspace_mib: expected MiB above 0, got '256'"),
    "queries of targets without queries": ({"target_query_ids": torch.zeros(M, dtype=torch.int64)}, "target_query_ids: expected query_ids"),
    "query ids that nothing asks for": (
        {"query_ids": ints(0, 1, 2, 3)},
        "query_ids: expected target_query_ids, query_negatives or symmetric beside",
    ),
    "a ring of one": ({"exchange": "ring"}, "exchange: expected a group beside 'ring'"),
    "a group of another kind": ({"group": "x"}, "group: expected a torch.distributed process group.*got 'x'"),
    "weight with a gradient": ({"weight": torch.ones(N, requires_grad=True)}, "weight: expected a tensor without gradient"),
    "widths in float": ({"matryoshka_dims": (1.0, 2.5)}, "matryoshka_dims: expected a tuple of ints"),
    "a width alone": ({"matryoshka_dims": 2}, "matryoshka_dims: expected a tuple of ints, got 2"),
    "Matryoshka weights with NaN": (
        {"matryoshka_dims": (1, 2), "matryoshka_weights": (1.0, float("nan"))},
        "matryoshka_weights: expected a tuple of finite",
    ),
    "temperature of integers": ({"temperature": torch.tensor(1)}, "temperature: expected a floating-point tensor, got torch.int64"),
    "temperature of words": ({"temperature": "0.02"}, "temperature: expected a number above 0, got '0.02'"),
    "margin NaN": ({"mask_margin": float("nan")}, "mask_margin: expected a finite number"),
    "hardness of None": ({"hardness": None}, "hardness: expected a finite number, got None"),
    "a switch of words": ({"symmetric": "no"}, "symmetric: expected True or False, got 'no'"),
    "ignore_index of None": ({"ignore_index": None}, "ignore_index: expected an int, got None"),
    "queries in eight bits": (
        {"query": torch.zeros(N, D).to(torch.float8_e4m3fn)},
        "query: expected a floating-point tensor of 16 bits or more.*float8",
    ),
    "sparse queries": ({"query": torch.ones(N, D).to_sparse()}, "query: expected a dense tensor"),
    "a temperature without an inverse": ({"temperature": 1e-40}, "temperature: expected one whose inverse float32 can hold"),
    "a tensor without an inverse": ({"temperature": torch.tensor(1e-40)}, "temperature: expected one whose inverse float32 can hold"),
    "queries as a list": ({"query": [[1.0, 2.0, 3.0]]}, "query: expected a tensor"),
    "hard negatives as a list": ({"hard_negatives": [torch.randn(2, D)] * N}, "hard_negatives: expected a tensor.*got list"),
    "hard ids as a list": (
        {"hard_negatives": torch.randn(N, 1, D), "hard_ids": [[0]] * N, "target_ids": torch.zeros(M).long()},
        "hard_ids: expected a tensor",
    ),
    "no room for a row": ({"workspace_mib": 1e-5}, "room for one row"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("function", [info_nce, info_nce_value_and_grad])
def test_bad_input(function, name):
    change, message = BAD[name]
    given = {**GOOD, **change}
    with refused(message):
        function(given.pop("query"), given.pop("target"), **given)


def test_options_that_do_not_exist():
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        info_nce(**GOOD, temprature=0.1)
    with pytest.raises(TypeError, match="did you mean 'symmetric'"):
        InfoNCELoss(symetric=True)


def test_value_and_grad_only():
    with refused("'none'"):
        info_nce_value_and_grad(**GOOD, reduction="none")
    with refused("wrt: expected names of"):
        info_nce_value_and_grad(**GOOD, wrt=("hard_negatives",))
    with refused("grad_dtype: expected a floating-point"):
        info_nce_value_and_grad(**GOOD, grad_dtype=torch.int64)


@pytest.mark.parametrize("start", [0.0005, 11.0, torch.tensor(100.0)])
def test_a_learnable_temperature_that_starts_outside(start):
    with refused(r"temperature: expected a start within \[0.001, 10\]"):
        InfoNCELoss(temperature=start, learnable_temperature=True)
    InfoNCELoss(temperature=start)


def test_options_that_a_module_holds_wait_for_those_of_the_batch():
    loss = InfoNCELoss(exchange="ring")
    with refused("exchange: expected a group"):
        loss(**GOOD)
    with refused("matryoshka_dims beside"):
        InfoNCELoss(matryoshka_weights=(1.0,))
    with refused("learnable_temperature: expected True or False"):
        InfoNCELoss(learnable_temperature="no")


def test_a_second_derivative_raises():
    query = GOOD["query"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(info_nce(query, GOOD["target"]), query, create_graph=True)


@pytest.mark.parametrize("backend", ["tritn", "cuda", None, 3])
def test_every_function_refuses_a_backend_that_does_not_exist(backend):
    mask = torch.ones(N, 5)
    hidden = torch.randn(N, 5, D)
    calls = {
        "info_nce": lambda: info_nce(**GOOD, backend=backend),
        "last_token_pool": lambda: last_token_pool(hidden, attention_mask=mask, backend=backend),
        "topk_similarity": lambda: topk_similarity(**GOOD, k=2, backend=backend),
        "pooled_info_nce": lambda: pooled_info_nce(hidden, hidden, query_attention_mask=mask, target_attention_mask=mask, backend=backend),
    }
    for call in calls.values():
        with refused("backend: expected one of auto, torch, triton"):
            call()


NAN = torch.tensor([1.0, 2.0, float("nan"), 1.0])
HIDDEN, MASK = torch.randn(2, 5, D), torch.ones(2, 5)
POOLING = {
    "neither": ({}, "neither"),
    "both": ({"attention_mask": MASK, "cu_seqlens": ints(0, 2)}, "both"),
    "a mask of another length": ({"attention_mask": MASK[:, :4]}, "attention_mask"),
    "padded with offsets": ({"cu_seqlens": ints(0, 5)}, r"packed \(T, D\)"),
    "one offset": ({"hidden": HIDDEN[0], "cu_seqlens": ints(5)}, "cu_seqlens"),
    "offsets in float": ({"hidden": HIDDEN[0], "cu_seqlens": torch.tensor([0.0, float("nan")])}, "cu_seqlens"),
    "offsets in bool": ({"hidden": HIDDEN[0], "cu_seqlens": torch.tensor([False, True])}, "cu_seqlens: expected integers"),
    "integers": ({"hidden": HIDDEN.long(), "attention_mask": MASK}, "floating-point"),
    "another device": ({"attention_mask": MASK.to("meta")}, "meta"),
    "a mask as a list": ({"attention_mask": MASK.tolist()}, "attention_mask: expected a tensor.*got list"),
    "offsets as a list": ({"hidden": HIDDEN[0], "cu_seqlens": [0, 5]}, "cu_seqlens: expected a tensor.*got list"),
    "hidden states as a list": ({"hidden": [HIDDEN[0]], "attention_mask": MASK}, "hidden: expected a tensor"),
    "no width": ({"hidden": HIDDEN[..., :0], "attention_mask": MASK}, "hidden: expected at least one column"),
    "a switch of words": ({"attention_mask": MASK, "normalize": "no"}, "normalize: expected True or False"),
    "an additive mask": ({"attention_mask": torch.tensor([[0.0, 0.0, 0.0, 0.0, float("-inf")]] * 2)}, "expected 1 for tokens.*additive"),
    "an additive mask of integers": ({"attention_mask": torch.tensor([[0, 0, 0, 0, -10000]] * 2)}, "expected 1 for tokens.*additive"),
    "eps of zero": ({"attention_mask": MASK, "eps": 0.0}, "eps: expected a number above 0"),
}


@pytest.mark.parametrize("name", POOLING)
def test_pooling(name):
    given, message = POOLING[name]
    with refused(message):
        last_token_pool(**{"hidden": HIDDEN, **given})


def test_pooled_loss_names_the_side():
    with refused("target_hidden: expected one of target_attention_mask"):
        pooled_info_nce(HIDDEN, HIDDEN, query_attention_mask=MASK)
    with refused("target_cu_seqlens: expected offsets"):
        pooled_info_nce(HIDDEN, HIDDEN[0], query_attention_mask=MASK, target_cu_seqlens=ints(0, 2, 6))


TOPK = {
    "a vector": ({"query": torch.randn(3)}, "query"),
    "mismatched D": ({"target": torch.randn(5, D + 1)}, "same width"),
    "dtypes differ": ({"target": torch.randn(5, D).bfloat16()}, "one dtype"),
    "devices differ": ({"target": torch.randn(5, D, device="meta")}, "one device"),
    "k of zero": ({"k": 0}, "k: expected 1 or more"),
    "k of True": ({"k": True}, "k: expected 1 or more, got True"),
    "exclude of other rows": ({"exclude": torch.zeros(9, 1).long()}, "exclude: expected"),
    "NaN in exclude": ({"exclude": torch.full((N, 1), float("nan"))}, "exclude: expected"),
    "exclude as a list": ({"exclude": [[0]] * N}, "exclude: expected a tensor.*got list"),
    "workspace": ({"workspace_mib": 0}, "workspace_mib"),
    "a switch of words": ({"validate": "x"}, "validate: expected True or False"),
    "NaN in targets": ({"target": NAN[:, None].expand(-1, D)}, "target: expected finite numbers.*row 2"),
    "NaN in queries": ({"query": NAN[:, None].expand(-1, D)}, "query: expected finite numbers.*row 2"),
    "NaN among many": ({"target": torch.where(torch.arange(900)[:, None] == 700, float("nan"), torch.randn(900, D))}, "target: .*row 700"),
    "NaN in the last block": (
        {"target": torch.where(torch.arange(901)[:, None] == 900, float("nan"), torch.randn(901, D))},
        "target: .*row 900",
    ),
    "infinities that cancel": ({"query": torch.full((N, D), 3e38), "target": torch.tensor([[3e38, -3e38, 0.0]] * 5)}, "finite products"),
}


@pytest.mark.parametrize("name", TOPK)
def test_topk(name):
    given, message = TOPK[name]
    with refused(message):
        topk_similarity(**{**GOOD, "k": 2, **given})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter takes tensors of a CPU")
def test_topk_with_kernels(monkeypatch):
    """The kernel passes over NaN, so that a look at the matrices is a check like the others."""
    pytest.importorskip("triton")
    given = {"query": GOOD["query"], "target": NAN[:, None].expand(-1, D), "k": 2, "backend": "triton"}
    with refused("target: expected finite numbers.*row 2"):
        topk_similarity(**given)
    monkeypatch.setattr("contrastive_kernels.checks.waits_for_device", lambda tensor: True)
    with refused("target: expected finite numbers.*row 2"):
        topk_similarity(**given, validate=True)
    assert bool((topk_similarity(**given)[1] != 2).all())


SIGMOID = {
    "scale NaN": ({"scale": float("nan")}, "scale: expected a finite number"),
    "scale zero": ({"scale": 0.0}, "scale: expected a number above 0, got 0.0"),
    "scale below zero": ({"scale": -2}, "scale: expected a number above 0, got -2"),
    "scale of two": ({"scale": torch.ones(2)}, "scale: expected a number or a tensor of one element"),
    "scale of integers": ({"scale": torch.tensor(10)}, "scale: expected a floating-point tensor"),
    "bias of two": ({"bias": torch.zeros(2)}, "bias"),
    "bias infinite": ({"bias": float("inf")}, "bias: expected a finite number"),
    "reduction": ({"reduction": "avg"}, "reduction"),
    "a switch of words": ({"normalize": "no"}, "normalize: expected True or False"),
    "ignore_index of words": ({"ignore_index": "a"}, "ignore_index: expected an int"),
    "query ids alone": ({"query_ids": torch.zeros(N, dtype=torch.int64)}, "query_ids: expected target_ids"),
    "ids and positives": (
        {"query_ids": torch.zeros(N).long(), "target_ids": torch.zeros(M).long(), "positives": ints(0, 1, 2, 3)},
        "query_ids and positives",
    ),
    "ids in float": ({"target_ids": torch.zeros(M)}, "NaN"),
    "exchange": ({"exchange": "mesh"}, "exchange"),
    "a ring of one": ({"exchange": "ring"}, "exchange: expected a group beside 'ring'"),
    "a group of another kind": ({"group": "x"}, "group: expected a torch.distributed process group"),
    "a mask of another length": ({"query_mask": torch.ones(3, dtype=torch.bool)}, "query_mask"),
    "weight with a gradient": ({"weight": torch.ones(N, requires_grad=True)}, "weight: expected a tensor without gradient"),
    "more queries than targets": ({"query": torch.randn(9, D)}, "pass positives"),
}


@pytest.mark.parametrize("name", SIGMOID)
def test_sigmoid(name):
    given, message = SIGMOID[name]
    with refused(message):
        sigmoid_loss(**{**GOOD, "scale": 10.0, "bias": -10.0, **given})


LOOKED_AT = {
    "positives": (info_nce, {**GOOD, "positives": ints(0, 1, 2, 8)}, "positives: expected indices"),
    "temperature": (info_nce, {**GOOD, "temperature": torch.tensor(-1.0)}, "temperature: expected a number above 0"),
    "weight": (info_nce, {**GOOD, "weight": NAN}, "weight: expected finite"),
    "hard offsets": (
        info_nce,
        {**GOOD, "hard_negatives": torch.randn(5, D), "hard_offsets": ints(0, 1, 2, 3, 4)},
        "hard_offsets: expected",
    ),
    "value and gradients": (info_nce_value_and_grad, {**GOOD, "positives": ints(0, 1, 2, 8)}, "positives: expected indices"),
    "sigmoid positives": (sigmoid_loss, {**GOOD, "scale": 5.0, "bias": 0.0, "positives": ints(0, 1, 2, 9)}, "positives: .*got 9 at 3"),
    "sigmoid scale": (sigmoid_loss, {**GOOD, "scale": torch.tensor(-1.0), "bias": 0.0}, "scale: expected a number above 0"),
    "sigmoid scale NaN": (sigmoid_loss, {**GOOD, "scale": torch.tensor(float("nan")), "bias": 0.0}, "scale: expected a number above 0"),
    "sigmoid bias": (sigmoid_loss, {**GOOD, "scale": 5.0, "bias": torch.tensor(float("nan"))}, "bias: expected a finite number"),
    "sigmoid weight": (sigmoid_loss, {**GOOD, "scale": 5.0, "bias": 0.0, "weight": NAN}, "weight: expected finite"),
    "lengths for offsets": (
        last_token_pool,
        {"hidden": HIDDEN[0], "cu_seqlens": ints(2, 3)},
        "cu_seqlens: expected offsets that rise from 0.*got 2 to 3",
    ),
    "offsets past the end": (last_token_pool, {"hidden": HIDDEN[0], "cu_seqlens": ints(0, 3, 6)}, "T=5, got 0 to 6"),
    "offsets that fall": (last_token_pool, {"hidden": HIDDEN[0], "cu_seqlens": ints(0, 4, 2, 5)}, "steps below 0"),
    "an additive mask": (
        last_token_pool,
        {"hidden": HIDDEN, "attention_mask": torch.where(MASK > 0, 0.0, -1e9).fill_(-1e9)},
        "attention_mask: expected 1 for tokens",
    ),
    "pooled offsets": (
        pooled_info_nce,
        {"query_hidden": HIDDEN[0], "target_hidden": HIDDEN[0], "query_cu_seqlens": ints(2, 3), "target_cu_seqlens": ints(0, 2)},
        "query_cu_seqlens: expected offsets",
    ),
    "exclude above": (
        topk_similarity,
        {**GOOD, "k": 2, "exclude": torch.full((N, 1), M)},
        "exclude: expected indices from 0 to 7 or -1, got 8",
    ),
    "exclude below": (topk_similarity, {**GOOD, "k": 2, "exclude": torch.full((N, 1), -2)}, "exclude: .*got -2"),
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_numbers_are_looked_at(name, monkeypatch):
    """On a CPU always; where looking waits for the device, with validate=True alone."""
    function, given, message = LOOKED_AT[name]
    with refused(message):
        function(**given)
    monkeypatch.setattr("contrastive_kernels.checks.waits_for_device", lambda tensor: True)
    with refused(message):
        function(**given, validate=True)
    try:
        function(**given)
    except ValueError as error:
        assert not re.search(message, str(error)), "looked at without being asked"
    except (IndexError, RuntimeError):
        pass  # what a GPU answers is another thing


SOURCE = ROOT / "kernels/contrastive_kernels"


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_refusal_in_the_source_has_its_mend(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and getattr(node.exc.func, "id", "") == "ValueError":
            text = "".join(part.value for part in ast.walk(node.exc) if isinstance(part, ast.Constant) and isinstance(part.value, str))
            assert "expected" in text and "got" in text and ";" in text, f"{file}, line {node.lineno}: {text}"
