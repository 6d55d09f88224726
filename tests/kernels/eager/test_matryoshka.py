"""Matryoshka levels from one sweep of plain torch: what takes that way, against the dense definition in float64."""

import pytest
import torch
import torch.nn.functional as F

from contrastive_kernels import info_nce, info_nce_value_and_grad
from contrastive_kernels.core.compute import compute
from contrastive_kernels.eager import matryoshka as levels
from contrastive_kernels.eager import sweep as panels
from contrastive_kernels.options import InfoNCEOptions
from contrastive_kernels.reference import info_nce_reference
from tests.kernels.helpers import products
from tests.kernels.helpers.definition import close, equals_the_definition
from tests.kernels.helpers.peak_bytes import PeakBytes
from tests.kernels.helpers.sampling import Case

TOGETHER = [
    (),
    ("positives",),
    ("target_ids",),
    ("query_mask", "target_mask"),
    ("own_negatives_only",),
    ("margin",),
    ("hardness",),
    ("learnt_temperature",),
    ("weight",),
    ("sum",),
    ("none",),
    ("none", "weight", "positives"),
    ("small_workspace",),
    ("relative", "target_ids", "positives", "learnt_temperature"),
]
APART = [("symmetric",), ("query_negatives",), ("target_negatives",), ("smoothing",), ("hard",), ("cold",)]
DIMS = [
    {"matryoshka_dims": (3, 8), "matryoshka_weights": (0.7, 1.3)},
    {"matryoshka_dims": (5, 1, 7, 2)},
    {"matryoshka_dims": (4,), "matryoshka_weights": (0.5,)},
]


@pytest.fixture
def calls(monkeypatch):
    """Tiles of five columns, and stretches of a few: every seam is there."""
    for module, name in ((panels, "TILE_COLUMNS"), (levels, "TILE_COLUMNS"), (levels, "PRODUCT_COLUMNS")):
        monkeypatch.setattr(module, name, 5)
    monkeypatch.setattr(levels, "SPARE", 16)
    made, real, sweep = [], levels.compute, levels.Sweep

    class Seams(sweep):
        def cut(self, tile, rows):
            assert len(self.tiles) == -(-self.columns // 5)
            cuts = super().cut(tile, rows)
            assert len(cuts) > 1 or rows < 8 or tile.width < 5
            return cuts

    monkeypatch.setattr(levels, "Sweep", Seams)
    monkeypatch.setattr(levels, "compute", lambda *arguments: made.append(1) or real(*arguments))
    return made


@pytest.mark.parametrize("way", products.WAYS)
@pytest.mark.parametrize("names", TOGETHER + APART)
@pytest.mark.parametrize("dims", DIMS)
def test_equals_the_definition(dims, names, way, calls, monkeypatch):
    products.force(monkeypatch, way)
    case = Case(8, 11, 22)
    case.target = case.target * 2
    options = {**case.options(names), **dims}
    if "small_workspace" in names:
        options["workspace_mib"] = 0.02
    equals_the_definition(case, options, 1e-10)
    assert bool(calls) == (names in TOGETHER)


def test_a_prefix_of_zeros_goes_level_by_level(calls):
    case = Case(9, 6, 6)
    case.query[2, :3] = 0
    result = [f(case.query, case.target, temperature=0.2, matryoshka_dims=(3, 8)) for f in (info_nce, info_nce_reference)]
    assert not calls
    close(*result, "loss")


@pytest.mark.parametrize("way", products.FLOAT32_WAYS)
@pytest.mark.parametrize("kind", ["isotropic", "crowded", "long tail"])
def test_float32_is_no_further_from_the_truth_than_autograd(kind, way, monkeypatch):
    products.force(monkeypatch, way, small=False)
    dims, generator = (16, 32, 64, 128), torch.Generator().manual_seed(3)
    errors = []
    for seed in range(6):
        query, target = (torch.randn(300, 128, generator=generator.manual_seed(10 * seed + side)) for side in (0, 1))
        if kind == "crowded":
            query, target = query + 1.7, target + 1.7
        elif kind == "long tail":
            query, target = (x * torch.logspace(0, -4, 128) for x in (query, target))
        target = 0.5 * query + 0.7 * target

        def ways(dtype):
            at = torch.tensor(0.05, dtype=dtype, requires_grad=True)
            given = [x.to(dtype).requires_grad_() for x in (query, target)]
            naive = sum(
                F.cross_entropy(F.normalize(given[0][:, :d], dim=1) @ F.normalize(given[1][:, :d], dim=1).T / at, torch.arange(300))
                for d in dims
            )
            ours = info_nce_value_and_grad(*given, temperature=at, matryoshka_dims=dims)
            return (ours.loss, ours.d_query, ours.d_target, ours.d_temperature), (naive.detach(), *torch.autograd.grad(naive, (*given, at)))

        truth, (ours, naive) = ways(torch.float64)[1], ways(torch.float32)
        errors.append([[float((x - y).norm() / y.norm()) for x, y in zip(found, truth)] for found in (ours, naive)])
    ours, naive = torch.tensor(errors).clamp(min=1e-8).log().mean(0).exp()
    assert (ours <= 2 * naive + torch.finfo(torch.float32).eps).all(), (ours, naive)


@pytest.mark.parametrize("threads, way", [(1, "mm"), (2, "mm"), (1, "onednn")])
@pytest.mark.parametrize("workspace", [8, 64])
def test_scratch_stays_within_the_workspace(workspace, threads, way, monkeypatch):
    """What is alive beyond inputs and gradients, storage by storage; with 8 MiB the target's gradient finds no second place."""
    products.force(monkeypatch, way, small=False)
    query, target = torch.randn(700, 512), torch.randn(9000, 512)
    options = InfoNCEOptions(workspace_mib=workspace, matryoshka_dims=(64, 128, 512), normalize=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with PeakBytes([query, target]) as live:
            result = compute(query, target, options, frozenset({"query", "target", "temperature"}))
    finally:
        torch.set_num_threads(before)
    others = sum(x.nbytes for x in (query, target, result.d_query, result.d_target))
    assert 0.4 * workspace * 2**20 < live.peak - others <= (workspace + 2) * 2**20
