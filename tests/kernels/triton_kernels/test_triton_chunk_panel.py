"""Two passes over float32 logits, against dense float64."""

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels.triton import configs
from contrastive_kernels.triton.kernels.chunk_panel import chunk_reduce, chunk_write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = configs.Tile(4, 32, 1, 4, 1)


def make(rows, columns, dtype=torch.float64):
    cos = torch.randn(rows, columns, dtype=dtype, device=DEVICE)
    options = dict(positive=torch.randint(0, columns, (rows,), device=DEVICE))
    kept = options["positive"][:, None] != torch.arange(columns, device=DEVICE)
    return cos, options, kept


# one row and column (no candidate is left); odd; around the block; far wider than it
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 31), (4, 32), (5, 33), (9, 200)])
@pytest.mark.parametrize("scale", [1.0, 1000.0])  # the second is out of range for any fixed shift
def test_reduce_and_write(rows, columns, scale):
    cos, options, kept = make(rows, columns)
    got = chunk_reduce(cos, scale=scale, smoothing=True, tile=SMALL, **options)
    logits = (cos * scale).masked_fill(~kept, float("-inf"))
    log_sum = torch.where(got.total > 0, got.shift + got.total.log(), float("-inf"))
    torch.testing.assert_close(log_sum, logits.logsumexp(1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got.best, cos.masked_fill(~kept, float("-inf")).amax(1))
    torch.testing.assert_close(got.logits, (cos * scale).masked_fill(~kept, 0).sum(1), rtol=1e-11, atol=1e-9)
    assert torch.equal(got.count, kept.sum(1).double())
    out = torch.full_like(cos, float("nan"))
    smooth = torch.rand(rows, dtype=torch.float64, device=DEVICE)
    shift = log_sum.clone()
    shift[-1] = float("inf")  # a row that takes no part
    chunk_write(cos, scale=scale, shift=shift, out=out, gain=1024.0, smooth=smooth, tile=SMALL, **options)
    truth = torch.where(kept, ((cos * scale - log_sum[:, None]).exp() - smooth[:, None]) * 1024, 0)
    truth[-1] = 0
    torch.testing.assert_close(out, truth, rtol=1e-9, atol=1e-12)


def test_masks_scales_and_an_empty_row():
    cos, options, kept = make(7, 70)
    ids = (torch.randint(0, 3, (7,), device=DEVICE), torch.randint(0, 3, (70,), device=DEVICE))
    keep = torch.rand(70, device=DEVICE) > 0.5
    row_scale, col_scale = torch.rand(7, dtype=torch.float64, device=DEVICE), torch.rand(70, dtype=torch.float64, device=DEVICE)
    threshold = torch.full((7,), 0.5, dtype=torch.float64, device=DEVICE)
    threshold[2] = -1e9  # nothing is left of this row
    scaled = cos * row_scale[:, None] * col_scale
    kept = kept & (ids[0][:, None] != ids[1]) & keep & (scaled <= threshold[:, None])
    options |= dict(ids=(ids, ids), keep=keep, threshold=threshold, row_scale=row_scale, col_scale=col_scale)
    got = chunk_reduce(cos, scale=5.0, tile=SMALL, **options)
    logits = (scaled * 5).masked_fill(~kept, float("-inf"))
    assert got.total[2] == 0 and got.shift[2] == got.best[2] == float("-inf")
    torch.testing.assert_close(got.shift + got.total.log(), logits.logsumexp(1))
    out = torch.full_like(cos, float("nan"))
    shift = torch.where(got.total > 0, got.shift, float("inf"))
    chunk_write(cos, scale=torch.tensor(5.0, device=DEVICE), shift=shift, out=out, tile=SMALL, **options)
    torch.testing.assert_close(out, torch.where(kept, (scaled * 5 - shift[:, None]).exp(), 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_output(dtype):
    cos, options, kept = make(6, 65, torch.float32)
    got = chunk_reduce(cos, scale=3.0, tile=SMALL, **options)
    out = torch.full(cos.shape, float("nan"), dtype=dtype, device=DEVICE)
    chunk_write(cos, scale=3.0, shift=got.shift, out=out, tile=SMALL, **options)
    truth = torch.where(kept, (cos.double() * 3 - got.shift.double()[:, None]).exp(), 0)
    assert ((out.double() - truth).abs() <= torch.finfo(dtype).eps * truth + 1e-7).all()
