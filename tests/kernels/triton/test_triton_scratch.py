"""Scratch of the Triton paths: live bytes beyond the gradients stay within the workspace."""

import dataclasses
import gc

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels.core.compute import compute
from contrastive_kernels.options import InfoNCEOptions
from contrastive_kernels.triton import matryoshka as levels
from contrastive_kernels.triton import operand_views as sides
from contrastive_kernels.triton import panel_sums as panel
from contrastive_kernels.triton import symmetric
from tests.kernels.helpers.paths import force
from tests.kernels.helpers.peak_bytes import PeakBytes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's allocations; a GPU counts its own")
N, M, D = 256, 320, 64
VECTORS = 64 * (N + M)  # numbers of a row or a column: sums, shifts, weights, orders


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def scratch(query, target, **options) -> int:
    """Most bytes alive at one time beyond inputs and gradients, which are float32."""
    fixed = 2 * 4 * (len(query) + len(target)) * query.shape[1]
    made = InfoNCEOptions.make({"backend": "triton", "temperature": 0.05, **options})
    with PeakBytes([query, target]) as live:
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


def test_masked_matrices_are_copied_once(monkeypatch):
    force(monkeypatch, "exp")
    made, stored = [], sides.stored
    monkeypatch.setattr(sides, "stored", lambda *args: made.append(1) or stored(*args))
    masks = dict(query_mask=torch.arange(N) % 5 != 0, target_mask=torch.arange(M) % 7 != 0)
    got = scratch(unit(N, D), unit(M, D), workspace_mib=0.1, **masks)  # several panels
    assert len(made) == 2  # queries and targets
    assert got <= 0.1 * 2**20 + VECTORS + 4 * (N + M) * D


@pytest.mark.parametrize("mib, panels", [(0.6, 1), (0.2, 0)])  # the second has no room for the whole panel
def test_both_directions(mib, panels, monkeypatch):
    taken, decide, joint = [], symmetric.decide, symmetric.joint

    def forced(*args):
        plan = decide(*args)
        way = next(way for way in plan.ways if way.path == "joint")
        return plan if way.reason else dataclasses.replace(plan, chosen=way)

    monkeypatch.setattr(symmetric, "decide", forced)
    monkeypatch.setattr(symmetric, "joint", lambda *args: taken.append(1) or joint(*args))
    assert scratch(unit(N, D), unit(N, D), symmetric=True, workspace_mib=mib) <= mib * 2**20 + VECTORS
    assert len(taken) == panels


def test_levels(monkeypatch):
    taken, plan, compute_levels = [], levels.plan, levels.compute

    def forced(*args):
        made = plan(*args)
        return dataclasses.replace(made, chosen=next(way for way in made.ways if way.path == "levels"))

    monkeypatch.setattr(levels, "plan", forced)
    monkeypatch.setattr(levels, "compute", lambda *args: taken.append(args[4]) or compute_levels(*args))  # rows of a panel
    # the gradients of a narrower level live until the levels are added up
    assert scratch(unit(N, 128), unit(M, 128), matryoshka_dims=(64, 128), workspace_mib=0.5) <= 0.5 * 2**20 + VECTORS + 4 * (N + M) * (
        128 + 64
    )
    assert len(taken) == 1 and taken[0] < N  # in panels
