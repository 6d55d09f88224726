"""How many launches a call is on a GPU, counted: below some thousand rows they are what a call takes."""

import pytest
import torch

pytest.importorskip("triton")

import contrastive_kernels as ck  # noqa: E402
from tests.kernels.launches import counted  # noqa: E402
from tests.kernels.paths import force  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's launches")
N, D = 96, 64


def launches(monkeypatch, path="exp", rows=None, backward=False, **options) -> list[str]:
    force(monkeypatch, path, rows)
    query, target = (torch.nn.functional.normalize(torch.randn(N, D), dim=1).requires_grad_(backward) for _ in range(2))
    with counted(monkeypatch) as names:
        if backward:
            ck.info_nce(query, target, backend="triton", **options).backward()
        else:
            ck.info_nce_value_and_grad(query, target, backend="triton", **options)
    assert names.count("_finish_kernel") == (1 if rows is None else -(-N // rows))  # what is counted is the way that was asked for
    return names


@pytest.mark.parametrize("options, most", [
    (dict(), 15),
    (dict(backward=True), 17),
    (dict(normalize=True), 17),
    (dict(normalize=True, backward=True), 19),
    (dict(path="chunk"), 14),
    (dict(path="chunk", normalize=True), 18),
    (dict(path="fused"), 15),
    (dict(rows=32), 15 + 2 * 9),  # three panels
    (dict(rows=24), 15 + 3 * 9),  # four
    (dict(temperature=torch.tensor(0.05)), 23),  # and its gradient
    (dict(weight=torch.rand(N)), 19),
    (dict(target_ids=torch.arange(N) // 2), 20),
], ids=str)  # fmt: skip
def test_launches_of_a_call(monkeypatch, options, most):
    names = launches(monkeypatch, **options)
    assert len(names) <= most, names


def test_default_positives_are_not_sorted(monkeypatch):
    assert not {"sort", "searchsorted"} & set(launches(monkeypatch))
    assert {"sort", "searchsorted"} <= set(launches(monkeypatch, positives=torch.randperm(N)))  # where they have to be, it is seen


def test_low_precision_gradients_are_cast_with_their_cotangent(monkeypatch):
    """Into bfloat16 in one pass: no product in float32 beside it."""
    force(monkeypatch, "exp")
    query, target = (torch.nn.functional.normalize(torch.randn(N, D), dim=1).bfloat16().requires_grad_() for _ in range(2))
    with counted(monkeypatch) as names:
        (ck.info_nce(query, target, backend="triton") * 3).backward()
    after = names[names.index("ones_like") :]
    assert after.count("mul") == 3 and not {"mul_", "_to_copy"} & set(after)  # the factor 3, and a gradient each
