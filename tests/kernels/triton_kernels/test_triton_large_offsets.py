"""Offsets beyond 2^31: matrices whose rows lie 2^30 elements apart in a sparse file, of which a few pages are ever there."""

import numpy
import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels.triton import configs
from contrastive_kernels.triton.kernels import norms, rows
from contrastive_kernels.triton.kernels.chunk_panel import chunk_reduce, chunk_write
from contrastive_kernels.triton.kernels.exp_panel import exp_panel
from contrastive_kernels.triton.kernels.fused import fused_backward, fused_forward
from contrastive_kernels.triton.kernels.pool import pool_backward, pool_forward
from contrastive_kernels.triton.kernels.sigmoid_panel import sigmoid_panel
from contrastive_kernels.triton.kernels.topk import topk
from contrastive_kernels.triton.symmetric import combine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is not sparse; bench/gpu has its own check")

STRIDE = 1 << 30
ROWS, WIDTH = 4, 16  # the last row begins at 3 * 2^30, beyond what 32 bits hold with a sign


@pytest.fixture
def far(tmp_path):
    """Makes (4, 16) float32 matrices with far rows; values as given, NaN in nothing that may be read."""

    def make(values=None):
        path = tmp_path / f"sparse-{len(list(tmp_path.iterdir()))}"
        memory = numpy.memmap(path, dtype=numpy.float32, mode="w+", shape=((ROWS - 1) * STRIDE + WIDTH,))
        matrix = torch.from_numpy(memory).as_strided((ROWS, WIDTH), (STRIDE, 1))
        matrix.copy_(torch.randn(ROWS, WIDTH) if values is None else values)
        return matrix

    return make


def equal(function, *matrices, **arguments):
    """The same from far rows as from near ones."""
    near = [m.clone(memory_format=torch.contiguous_format) for m in matrices]
    theirs, ours = function(*matrices, **arguments), function(*near, **arguments)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (theirs, ours))):
        assert a.isfinite().all() and torch.equal(a, b)


def test_products_and_panels(far):
    x, y, tile = far(), far(), configs.Tile(16, 16, 16, 4, 1)
    shift = torch.zeros(ROWS)

    def exponentials(x, y, out=None):
        panel = exp_panel(x, y, scale=1.0, shift=shift, out=out, row_max=True, tile=tile)
        return panel.e[0], panel.row_sum, panel.row_max

    equal(exponentials, x, y)
    out = far(torch.full((ROWS, WIDTH), float("nan")))[None, :, :ROWS]
    assert torch.equal(exponentials(x, y, out)[0], exponentials(x.clone(), y.clone())[0]) and torch.equal(out[0], exponentials(x, y)[0])
    equal(lambda x, y: topk(x, y, 2, tile=tile), x, y)


def test_prefixes(far):
    x, y, tile = far(), far(), configs.Tile(16, 16, 8, 4, 1)
    scales, levels = dict(row_scale=torch.rand(2, ROWS), col_scale=torch.rand(2, ROWS)), torch.tensor([8, 16], dtype=torch.int32)

    def exponentials(x, y, out=None):
        panel = exp_panel(x, y, scale=1.0, shift=torch.zeros(2, len(x)), out=out, row_max=True, tile=tile, levels=levels, **scales)
        return panel.e, panel.row_sum, panel.row_max

    equal(exponentials, x, y)
    near = exponentials(x.clone(), y.clone())[0]
    out = far(torch.full((ROWS, WIDTH), float("nan"))).view(2, 2, WIDTH)[:, :, :ROWS]  # two levels of two rows
    scales["row_scale"] = scales["row_scale"][:, 2:].contiguous()
    exponentials(x[2:], y, out)
    assert torch.equal(out, near[:, 2:])


def test_sigmoid(far):
    x, y, number, tile = far(), far(), torch.tensor(1.0), configs.Tile(16, 16, 16, 4, 1)

    def pairs(x, y):
        out = torch.full((ROWS, ROWS), float("nan"))
        return sigmoid_panel(x, y, scale=number, bias=number, out=out, tile=tile), out

    equal(pairs, x, y)


def test_both_directions_factors(far):
    f, h = torch.rand(ROWS), torch.rand(WIDTH)

    def both(e):
        combine(e, f, h)
        return e.clone()

    equal(both, far())


def test_passes_over_logits(far):
    cos, out = far(), far(torch.full((ROWS, WIDTH), float("nan")))
    tile = configs.Tile(4, 32, 1, 4, 1)

    def both(cos, out):
        sums = chunk_reduce(cos, scale=2.0, tile=tile)
        chunk_write(cos, scale=2.0, shift=sums.shift, out=out, tile=tile)
        return sums.total, sums.best, out.clone()

    equal(both, cos, out)


def test_fused(far):
    x, y = far(), far()

    def both(x, y):
        sums = fused_forward(x, y, scale=1.0)
        return sums.total, sums.weighted, fused_backward(x, y, scale=1.0, shift=sums.shift, factor=sums.total)

    equal(both, x, y)


def test_rows(far):
    out, x, y = far(), far(), far()
    a, index = torch.rand(ROWS), torch.tensor([3, 3, 0, 2])
    segments = rows.Segments.make(index, ROWS)

    def every(out, x, y):
        dot = rows.update(out, x=x, a=a, y=y, b=a, index=index, z=y, dot=True, add=True)
        rows.scatter(out, segments, x=x, a=a, y=y, b=a, add=True)
        return out.clone(), dot, norms.dots(x, y, index, torch.float32)

    near = [m.clone() for m in (out, x, y)]
    for ours, theirs in zip(every(out, x, y), every(*near)):
        assert torch.equal(ours, theirs)


def test_pooling(far):
    hidden, index = far(), torch.tensor([3, 0])

    def both(hidden):
        out, inverse = pool_forward(hidden, index)
        return out, pool_backward(out + 1, hidden, index, inverse)

    equal(both, hidden)
