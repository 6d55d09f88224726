"""Products of the torch backend: every layout of operands, through oneDNN where it is taken, against float64."""

import itertools

import pytest
import torch

from contrastive_kernels import gemm

LAYOUTS = {
    "contiguous": lambda x: x.clone(), "transposed": lambda x: x.T.contiguous().T, "columns of a wider": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "rows of a wider, transposed": lambda x: torch.cat([x, x], 0).T.contiguous().T[: len(x)], "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.fixture(params=[True, False])
def onednn(request, monkeypatch):
    """Takes oneDNN for every size, where torch has it, or never: the rule goes by processor, and both ways must be right on all."""
    taken = request.param and hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    monkeypatch.setattr(gemm, "prefers_onednn", lambda dtype, device: taken and dtype == torch.float32)
    monkeypatch.setattr(gemm, "LEAST_FLOP", 1)


@pytest.mark.parametrize("a, b", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_products(a, b, onednn):
    x, y, base = torch.randn(17, 9), torch.randn(33, 9), torch.randn(17, 33)
    truth = x.double() @ y.double().T
    for scale in (1.0, 50.0, torch.tensor(0.3)):
        out = torch.full((17, 33), float("nan"))
        gemm.product_into(out, LAYOUTS[a](x), LAYOUTS[b](y), scale)
        torch.testing.assert_close(out.double(), truth * float(scale), rtol=1e-5, atol=1e-5 * float(scale))
    wide = torch.full((17, 40), float("nan"))
    gemm.product_into(wide[:, 3:36], LAYOUTS[a](x), LAYOUTS[b](y))
    torch.testing.assert_close(wide[:, 3:36].double(), truth, rtol=1e-5, atol=1e-5)
    assert wide[:, :3].isnan().all() and wide[:, 36:].isnan().all()
    gemm.add_product(base, LAYOUTS[a](x), LAYOUTS[b](y))
    assert torch.equal(gemm.transposed(x, 5), x.T)


def test_rows_of_a_wider_matrix_are_made_tight_for_onednn(onednn, monkeypatch):
    """Strided rows as the second operand take oneDNN's reference kernel, a thousand times slower: it must never see them."""
    seen = []

    def watched(a, b, *rest):
        seen.append(b.is_contiguous() or b.T.is_contiguous())
        return a @ b.T

    monkeypatch.setattr(gemm.torch.ops.mkldnn, "_linear_pointwise", watched)
    taken = gemm.prefers_onednn(torch.float32, torch.device("cpu"))
    x, out = torch.randn(16, 32), torch.empty(16, 24)
    for name, layout in LAYOUTS.items():
        seen.clear()
        y = torch.randn(24, 32)
        gemm.product_into(out, x, layout(y))
        gemm.add_product(out, x, layout(y))
        gemm.product(x, layout(y))
        torch.testing.assert_close(out, 2 * x @ y.T, msg=name)
        assert seen == [True] * 3 * taken, name


@pytest.mark.skipif(not gemm.prefers_onednn(torch.float32, torch.device("cpu")), reason="oneDNN is taken on AMD processors with AVX-512 alone: elsewhere there is nothing to time")
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
