"""Every operator under torch.library.opcheck: schema, fake tensors, autograd and tracing, in plain torch and through the kernels."""

import pytest
import torch

from contrastive_kernels.distillation_loss import _cotangent_op as distillation_cotangent_op
from contrastive_kernels.distillation_loss import _op as distillation_op
from contrastive_kernels.info_nce_op import _cotangent_op, info_nce_op, pack
from contrastive_kernels.options import InfoNCEOptions
from contrastive_kernels.pooling import _pool, _pool_backward, _rows, last_token_rows
from contrastive_kernels.sigmoid_loss import _cotangent_op as sigmoid_cotangent_op
from contrastive_kernels.sigmoid_loss import _op as sigmoid_op
from contrastive_kernels.topk import _topk
from tests.kernels.helpers.sampling import Case, random_sets

N, M, D = 5, 10, 8
BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter takes tensors of a CPU")),
]


@pytest.fixture(autouse=True)
def kernels(request):
    if "triton" in request.node.callspec.params.values():
        pytest.importorskip("triton")


def arguments(names, seed=0, **more):
    """What the operator is called with, every gradient wanted that exists."""
    case = Case(seed, N, M, D)
    made = InfoNCEOptions.make({**case.options(names), **more})
    given = {"query": case.query.nan_to_num(), "target": case.target.nan_to_num()}
    given.update({name: getattr(made, name) for name in ("hard_negatives", "temperature") if isinstance(getattr(made, name), torch.Tensor)})
    given = {name: value.clone().requires_grad_() for name, value in given.items()}
    query, target, *_ = given.values()
    made = made.replace(**{name: value for name, value in given.items() if name not in ("query", "target")})
    return pack(query, target, made, frozenset(given))


SETS = [
    (),
    ("symmetric", "packed_hard"),
    ("none", "weight"),
    ("learnt_temperature", "hard"),
    ("learnt_temperature", "matryoshka"),
    *random_sets(6, seed=21),
]


@pytest.mark.parametrize("backend", ["torch"])
@pytest.mark.parametrize("index", range(len(SETS)))
def test_info_nce(index, backend):
    torch.library.opcheck(info_nce_op, arguments(SETS[index], index, return_stats=bool(index % 2), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("names", [("learnt_temperature",), ("hard_with_ids", "symmetric"), ("none",)])
def test_info_nce_with_kernels(names, backend):
    torch.library.opcheck(info_nce_op, arguments(names, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", [("learnt_temperature", "weight"), ("hard", "normalize")])
def test_gradients_of_a_cotangent(names, backend):
    """Called in the backward of reduction="none", without gradients of its own."""
    values = arguments(names, backend=backend, reduction="sum")
    torch.library.opcheck(_cotangent_op, [value.detach() if isinstance(value, torch.Tensor) else value for value in values])


def hidden_states():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    return torch.randn(N, 4, D, dtype=torch.float64), mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling(normalize, backend):
    hidden, mask = hidden_states()
    index = last_token_rows(hidden, mask)
    torch.library.opcheck(_pool, (hidden.requires_grad_(), index, normalize, 1e-12, backend))
    hidden = hidden.detach()
    _, inverse = _pool(hidden, index, normalize, 1e-12, backend)
    torch.library.opcheck(_pool_backward, (torch.randn(N, D, dtype=torch.float64), hidden, index, inverse, normalize, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_last_tokens(backend):
    torch.library.opcheck(_rows, (hidden_states()[1], None, N, backend, True, "attention_mask"))
    torch.library.opcheck(_rows, (None, torch.tensor([0, 3, 3, 8], dtype=torch.int32), 9, backend, False, "cu_seqlens"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("targets, exclude", [(9, torch.tensor([[1], [2], [-1], [0]])), (2, None)])
def test_search(targets, exclude, backend):
    torch.library.opcheck(_topk, (torch.randn(4, D), torch.randn(targets, D), 3, exclude, 1 << 20, backend, True))


def number(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


TOGETHER = {
    "alone": (None,) * 6,
    "positives": (torch.tensor([1, -100, 3, 3, 9]), None, torch.arange(M) % 4, torch.arange(N) != 2, torch.arange(M) != 5, torch.rand(N)),
    "ids": (None, torch.arange(N), torch.arange(M) % 4, None, None, torch.rand(N)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", TOGETHER)
def test_sigmoid(name, reduction):
    query, target = (torch.randn(rows, D, dtype=torch.float64, requires_grad=True) for rows in (N, M))
    rest = (True, -100, reduction, None, "gather", True, "0123")
    torch.library.opcheck(sigmoid_op, (query, target, number(2.0), number(-1.0), *TOGETHER[name], *rest))
    if reduction == "sum":
        tensors = [x.detach() for x in (query, target, number(2.0), number(-1.0))]
        torch.library.opcheck(sigmoid_cotangent_op, (*tensors, *TOGETHER[name], *rest))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_distillation(reduction, backend):
    student = [torch.randn(N, D, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(N, 3, dtype=torch.float64) for _ in range(2)]
    rest = (
        torch.rand(N),
        torch.arange(N) != 1,
        torch.arange(N) != 2,
        0.0,
        0.5,
        reduction == "sum",
        True,
        reduction,
        None,
        None,
        backend,
        "012",
    )
    torch.library.opcheck(distillation_op, (*student, *teacher, number(0.3), *rest))
    if reduction == "sum":
        tensors = [x.detach() for x in (*student, *teacher, number(0.3))]
        torch.library.opcheck(distillation_cotangent_op, (*tensors, *rest))
