"""Products of the torch backend: every layout of operands, through oneDNN where it is taken, against float64."""

import itertools
import math

import pytest
import torch

from contrastive_kernels.eager import gemm
from tests.kernels.helpers import products

LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.T.contiguous().T,
    "columns of a wider": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "rows of a wider, transposed": lambda x: torch.cat([x, x], 0).T.contiguous().T[: len(x)],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.fixture(params=products.FLOAT32_WAYS)
def way(request, monkeypatch):
    products.force(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("a, b", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_products(a, b, way):
    x, y, base = torch.randn(17, 9), torch.randn(33, 9), torch.randn(17, 33)
    truth = x.double() @ y.double().T
    for second in (LAYOUTS[b](y), gemm.packed(LAYOUTS[b](y), 17), gemm.operand_of(LAYOUTS[b](y).T, 17)):
        out = torch.full((17, 33), float("nan"))
        gemm.product_into(out, LAYOUTS[a](x), second)
        torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
        wide = torch.full((17, 40), float("nan"))
        gemm.product_into(wide[:, 3:36], LAYOUTS[a](x), second)
        torch.testing.assert_close(wide[:, 3:36].double(), truth, rtol=1e-5, atol=1e-5)
        assert wide[:, :3].isnan().all() and wide[:, 36:].isnan().all()
        torch.testing.assert_close(gemm.product(LAYOUTS[a](x), second).double(), truth, rtol=1e-5, atol=1e-5)
        added = base.clone()
        gemm.add_product(added, LAYOUTS[a](x), second)
        torch.testing.assert_close(added.double(), truth + base, rtol=1e-5, atol=1e-5)
    assert torch.equal(gemm.transposed(x, 5), x.T)


def test_what_is_packed(way):
    assert isinstance(gemm.packed(torch.randn(33, 9), 17), gemm.Packed) == (way == "onednn")
    assert not isinstance(gemm.packed(torch.randn(33, 9, dtype=torch.float64), 17), gemm.Packed)


@pytest.mark.parametrize("terms", [1, 192, 193, 256, 511, 512, 513, 1024, 1025, 1536, 5000])
def test_a_sum_is_cut_into_equal_parts(terms):
    cuts = gemm._cuts(terms)
    assert torch.equal(torch.cat([torch.arange(terms)[cut] for cut in cuts]), torch.arange(terms))
    lengths = [cut.stop - cut.start for cut in cuts]
    assert max(lengths) - min(lengths) < len(lengths) and max(lengths) <= (256 if 192 < terms <= 512 else 1024)


# 512 and less are cut by us alone; beyond, oneDNN cuts once more by itself: only where it is taken is that known
@pytest.mark.parametrize(
    "terms", [64, 192, 256, 384, 512, *((768, 1024, 1536, 3000) if gemm.prefers_onednn(torch.float32, torch.device("cpu")) else ())]
)
def test_onednn_adds_no_long_stretch_of_terms_one_by_one(terms, monkeypatch):
    """The rounding of partial sums is a random walk: in stretches of b terms it leaves 1.77e-8 sqrt(b + terms / b) of the sum in float32.

    Uncut, sums of 256, 512 and 1,536 terms are 1.3 times beyond what is allowed here.
    """
    products.force(monkeypatch, "onednn", small=False)
    x, y = (torch.randn(512, terms) for _ in range(2))
    truth, stretch = x.double() @ y.double().T, terms / 2 if 192 < terms <= 512 else min(terms, 512)
    base = torch.zeros(512, 512)
    gemm.add_product(base, x, y)
    for found in (base, gemm.product(x, y), gemm.product(x, gemm.packed(y, 512)), gemm.product(x, y.T.contiguous().T)):
        error = float((found - truth).norm() / truth.norm())
        assert error < 1.08 * 1.77e-8 * math.sqrt(stretch + terms / stretch)


def test_rows_of_a_wider_matrix_are_made_tight_for_onednn(way, monkeypatch):
    """Strided rows as the second operand take oneDNN's reference kernel, a thousand times slower: it must never see them."""
    seen = []

    def watched(a, b):
        seen.append(b.is_contiguous() or b.T.is_contiguous())
        return a @ b.T

    monkeypatch.setattr(gemm, "_onednn", watched)
    taken = 3 * len(gemm._cuts(32)) if way == "onednn" else 0
    x, out = torch.randn(16, 32), torch.empty(16, 24)
    for name, layout in LAYOUTS.items():
        seen.clear()
        y = torch.randn(24, 32)
        gemm.product_into(out, x, layout(y))
        gemm.add_product(out, x, layout(y))
        gemm.product(x, layout(y))
        torch.testing.assert_close(out, 2 * x @ y.T, msg=name)
        assert seen == [True] * taken, name


@pytest.mark.skipif(
    not gemm.prefers_onednn(torch.float32, torch.device("cpu")),
    reason="oneDNN is taken on AMD processors with AVX-512 alone: elsewhere there is nothing to time",
)
def test_rows_of_a_wider_matrix_are_not_slow():
    """oneDNN's reference kernel is a thousand times slower than its others, and strided rows would take it."""
    import time

    x, y = torch.randn(256, 512), torch.randn(256, 1024)[:, :512]
    out = torch.empty(256, 256)

    def seconds(b):
        gemm.product_into(out, x, b)
        start = time.process_time()
        gemm.product_into(out, x, b)
        return time.process_time() - start

    assert min(seconds(y) for _ in range(3)) < 30 * max(seconds(y.contiguous()), 1e-3)
