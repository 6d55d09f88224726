"""torch.compile takes two compilations for any sizes, one with the first and one with symbols, and torch.export keeps a batch symbolic."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.export import Dim, export

from contrastive_kernels import distillation_loss, info_nce, last_token_pool, pooled_info_nce, sigmoid_loss, topk_similarity

SIZES = (4, 5, 6, 7, 9, 11, 13, 15, 17, 19)  # more than the eight compilations after which torch gives up
WIDTH = 16


def rows(n, width=WIDTH):
    return torch.nn.functional.normalize(torch.randn(n, width), dim=1)


def info_nce_with(**options):
    """`info_nce` with options made of the batch size, as (function, arguments of a size)."""

    def function(query, target, *values):
        return info_nce(query, target, **dict(zip(options, values)))

    return function, lambda n: (rows(n).requires_grad_(), rows(n), *(make(n) for make in options.values()))


def scale_and_bias(n):
    return torch.tensor(10.0), torch.tensor(-10.0)


def hidden(n, length):
    return torch.randn(n, length, WIDTH), torch.ones(n, length, dtype=torch.int64)


CASES = {
    "plain": info_nce_with(),
    "hard negatives of every row": (info_nce_with()[0], lambda n: (rows(n), rows(2 * n))),
    "positives": info_nce_with(positives=torch.arange),
    "target ids": info_nce_with(target_ids=torch.arange),
    "queries of targets": info_nce_with(query_ids=torch.arange, target_query_ids=torch.arange),
    "masks": info_nce_with(query_mask=lambda n: torch.arange(n) > 0, target_mask=lambda n: torch.arange(n) > 0),
    "weight": info_nce_with(weight=torch.rand),
    "own negatives only": info_nce_with(own_negatives_only=lambda n: torch.arange(n) > 0),
    "hard negatives": info_nce_with(hard_negatives=lambda n: rows(2 * n).view(n, 2, WIDTH)),
    "hard ids": info_nce_with(
        hard_negatives=lambda n: rows(2 * n).view(n, 2, WIDTH), target_ids=torch.arange, hard_ids=lambda n: torch.zeros(n, 2).long()
    ),
    "packed hard negatives": info_nce_with(
        hard_negatives=lambda n: rows(2 * n), hard_offsets=lambda n: torch.arange(0, 2 * n + 1, 2), label_smoothing=lambda n: 0.1
    ),
    "temperature": info_nce_with(temperature=lambda n: torch.tensor(0.01 * n)),
    "row temperatures": info_nce_with(temperature=lambda n: 0.1 + torch.rand(n)),
    "sigmoid": (
        lambda q, t, scale, bias, ids: sigmoid_loss(q, t, scale=scale, bias=bias, query_ids=ids, target_ids=ids),
        lambda n: (rows(n), rows(n), *scale_and_bias(n), torch.arange(n)),
    ),
    "distillation": (
        lambda *matrices: distillation_loss(*matrices, symmetric=True, normalize=True),
        lambda n: (rows(n), rows(n), rows(n), rows(n)),
    ),
    "pooling, padded": (lambda h, mask: last_token_pool(h, attention_mask=mask), lambda n: hidden(n, n + 3)),
    "pooling, packed": (
        lambda h, offsets: last_token_pool(h, cu_seqlens=offsets),
        lambda n: (torch.randn(3 * n, WIDTH), torch.arange(0, 3 * n + 1, 3)),
    ),
    "pooled loss": (
        lambda q, t, q_mask, t_mask: pooled_info_nce(q, t, query_attention_mask=q_mask, target_attention_mask=t_mask),
        lambda n: (torch.randn(n, n + 3, WIDTH), torch.randn(n, n + 2, WIDTH), hidden(n, n + 3)[1], hidden(n, n + 2)[1]),
    ),
    "top-k": (lambda q, t, exclude: topk_similarity(q, t, 2, exclude=exclude), lambda n: (rows(n), rows(2 * n), torch.zeros(n, 3).long())),
}


@pytest.mark.parametrize("function, arguments", CASES.values(), ids=CASES)
def test_two_compilations_for_any_sizes(function, arguments):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for n in SIZES:
        compiled(*arguments(n))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["plain", "target ids", "sigmoid", "pooling, padded", "top-k"])
def test_an_exported_batch_stays_symbolic(name):
    function, arguments = CASES[name]

    class Module(torch.nn.Module):
        def forward(self, *values):
            return function(*values)

    given, batch = arguments(8), Dim("batch", min=2, max=512)
    # of top-k twice as many targets; of pooling three tokens more
    length = {"top-k": 2 * batch, "pooling, padded": batch + 3}.get(name, batch)
    shapes = tuple(
        {} if x.dim() == 0 else {0: length if name == "top-k" and i == 1 else batch, **({1: length} if "pooling" in name else {})}
        for i, x in enumerate(given)
    )
    program = export(Module(), given, dynamic_shapes=(shapes,)).module()
    for n in (5, 12):
        values = arguments(n)
        torch.testing.assert_close(program(*values), function(*values), rtol=0, atol=0)
