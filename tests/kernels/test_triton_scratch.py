"""Scratch of the Triton paths: live bytes beyond the gradients stay within the workspace."""

import gc

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels.compute import compute  # noqa: E402
from contrastive_kernels.options import InfoNCEOptions  # noqa: E402
from contrastive_kernels.triton import levels, panel, symmetric  # noqa: E402
from tests.kernels.paths import force  # noqa: E402
from train.live_bytes import LiveBytes  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's allocations; a GPU counts its own")
N, M, D = 256, 320, 64
VECTORS = 64 * (N + M)  # numbers of a row or a column: sums, shifts, weights, orders


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def scratch(query, target, **options) -> int:
    """Most bytes alive at one time beyond inputs and gradients, which are float32."""
    fixed = 2 * 4 * (len(query) + len(target)) * query.shape[1]
    made = InfoNCEOptions.make({"backend": "triton", "temperature": 0.05, **options})
    with LiveBytes([query, target]) as live:
        out = compute(query, target, made, frozenset(("query", "target")))
    assert out.d_query.isfinite().all() and live.peak > fixed
    return live.peak - fixed


@pytest.fixture(autouse=True)
def collected(monkeypatch):
    """The interpreter keeps a launch's arguments in cycles: they are collected before a panel is made."""
    for name in ("cosines", "exponentials"):
        original = getattr(panel, name)
        monkeypatch.setattr(panel, name, lambda *args, original=original, **kwargs: [gc.collect(), original(*args, **kwargs)][1])


@pytest.mark.parametrize("path, mib", [("exp", 0.1), ("chunk", 0.3)])  # of panels that would be 0.31 and 0.62 MiB
def test_panels(path, mib, monkeypatch):
    force(monkeypatch, path)
    got = scratch(unit(N, D), unit(M, D), workspace_mib=mib)
    assert got <= mib * 2**20 + VECTORS
    assert got >= 0.3 * mib * 2**20  # and the workspace is used


def test_fused_needs_none(monkeypatch):
    force(monkeypatch, "fused")
    assert scratch(unit(N, D), unit(M, D), workspace_mib=0.1) <= 0.1 * 2**20 + VECTORS


def test_both_directions(monkeypatch):
    monkeypatch.setattr(symmetric, "WORTH_A_LOOK", float("-inf"))
    taken = []
    joint = symmetric.joint
    monkeypatch.setattr(symmetric, "joint", lambda *args: taken.append(1) or joint(*args))
    for mib in (0.6, 0.2):  # the second has no room for the whole panel
        assert scratch(unit(N, D), unit(N, D), symmetric=True, workspace_mib=mib) <= mib * 2**20 + VECTORS
    assert len(taken) <= 1


def test_levels(monkeypatch):
    plans = []
    plan = levels.plan
    monkeypatch.setattr(levels, "plan", lambda *args: plans.append(plan(*args)) or plans[-1])
    # the gradients of a narrower level live until the levels are added up
    assert scratch(unit(N, 128), unit(M, 128), matryoshka_dims=(64, 128), workspace_mib=0.5) <= 0.5 * 2**20 + VECTORS + 4 * (N + M) * (128 + 64)
    assert plans
