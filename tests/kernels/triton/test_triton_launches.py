"""How many launches a call is on a GPU, counted: below some thousand rows they are what a call takes."""

import pytest
import torch

pytest.importorskip("triton")

import contrastive_kernels as ck
from contrastive_kernels import roofline
from contrastive_kernels.core.compute import compute
from contrastive_kernels.options import InfoNCEOptions
from tests.kernels.helpers.launches import counted
from tests.kernels.helpers.paths import force

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's launches")
N, D = 96, 64


def launches(monkeypatch, path="exp", rows=None, backward=False, large=False, **options) -> list[str]:
    """large: as panels of more than 2^26 exponentials, whose unsafe rows are found by their sums."""
    if large:
        monkeypatch.setattr(roofline, "SUMS_ALONE", 1)
    force(monkeypatch, path, rows)
    query, target = (torch.nn.functional.normalize(torch.randn(N, D), dim=1).requires_grad_(backward) for _ in range(2))
    with counted(monkeypatch) as names:
        if backward:
            ck.info_nce(query, target, backend="triton", **options).backward()
        else:
            ck.info_nce_value_and_grad(query, target, backend="triton", **options)
    kernel = "_slopes_kernel" if path == "dense" else "_finish_kernel"
    assert names.count(kernel) == (1 if rows is None else -(-N // rows))  # what is counted is the way that was asked for
    return names


@pytest.mark.parametrize(
    "options, most",
    [
        (dict(), 15),
        (dict(backward=True), 17),
        (dict(normalize=True), 17),
        (dict(normalize=True, backward=True), 19),
        (dict(path="dense"), 8),
        (dict(path="dense", backward=True), 10),
        (dict(path="chunk"), 14),
        (dict(path="chunk", normalize=True), 18),
        (dict(path="fused"), 16),
        (dict(rows=32), 15 + 2 * 9),  # three panels
        (dict(rows=24), 15 + 3 * 9),  # four
        (dict(temperature=torch.tensor(0.05)), 24),  # and its gradient; of a temperature on the host, read there
        (dict(large=True), 17),
        (dict(large=True, backward=True), 19),
        (dict(large=True, rows=24), 50),
        (dict(large=True, rows=24, backward=True), 52),
        (dict(positives=torch.arange(N).flip(0)), 29),  # sorted by target, to be added in a fixed order
        (dict(weight=torch.arange(1.0, N + 1)), 19),
        (dict(target_ids=torch.arange(N) // 2), 20),
    ],
    ids=lambda x: ",".join(x) or "plain" if isinstance(x, dict) else str(x),
)
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


# what reads a tensor's numbers to go on, and so waits for the device; it cannot stand in a CUDA graph either
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2", "allclose", "bincount"}


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(normalize=True),
        dict(symmetric=True, normalize=True),
        dict(weight=torch.rand(N)),
        dict(positives=torch.randperm(N)),
        dict(target_ids=torch.arange(N) // 2),
        dict(query_mask=torch.rand(N) > 0.2, target_mask=torch.rand(N) > 0.2),
        dict(mask_margin=0.1, return_stats=True),
        dict(own_negatives_only=torch.rand(N) > 0.5, hard_negatives=torch.randn(N, 2, D)),
        dict(label_smoothing=0.1),
        dict(matryoshka_dims=(32, 64)),
        dict(query_negatives=True, target_negatives=True),
        dict(temperature=0.001),
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_nothing_waits_and_nothing_depends_on_values(monkeypatch, options):
    """The same launches whatever the numbers, and none of their numbers read by the host: what a CUDA graph can hold."""
    made = InfoNCEOptions.make({**options, "backend": "triton"})
    runs = []
    for scale in (1.0, 3.0):  # of the second, rows are done again
        query, target = (scale * torch.nn.functional.normalize(torch.randn(N, D), dim=1) for _ in range(2))
        with counted(monkeypatch) as names:
            compute(query, target, made, frozenset(("query", "target")))
        runs.append(names)
    assert runs[0] == runs[1] and not WAITS & set(runs[0])
