"""Small-D kernels without a panel in memory, against dense float64."""

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels.triton import configs, launch_log
from contrastive_kernels.triton.kernels.fused import fused_backward, fused_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = configs.Tile(32, 32, 0, 4, 1)
TRUTH = torch.float64 if DEVICE == "cpu" else torch.float32
TIGHT = dict(rtol=1e-10, atol=1e-12) if TRUTH == torch.float64 else dict(rtol=1e-4, atol=1e-5)


def unit(rows, width, dtype=TRUTH):
    x = torch.nn.functional.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1)
    return x.to(dtype).to(DEVICE)


def dense(x, y, scale, positive=None, ids=(), threshold=None, keep=None, row_scale=None, col_scale=None, column_offset=0):
    """(logits with -inf where dropped, unit x, unit y), float64."""
    x, y = x.double(), y.double()
    if row_scale is not None:
        x, y = x * row_scale.double()[:, None], y * col_scale.double()[:, None]
    cos = x @ y.T
    gone = torch.zeros_like(cos, dtype=torch.bool)
    if threshold is not None:
        gone |= cos > threshold.double()[:, None]
    if keep is not None:
        gone |= ~keep[None]
    if positive is not None:
        gone |= positive[:, None] == torch.arange(column_offset, column_offset + len(y), device=x.device)[None]
    for row, col in ids:
        gone |= row[:, None] == col[None]
    return (cos * float(scale)).masked_fill(gone, float("-inf")), x, y


def check(x, y, scale, splits=None, tolerance=TIGHT, **masks):
    logits, ux, uy = dense(x, y, scale, **masks)
    top = logits.amax(1)
    e = (logits - torch.where(top > float("-inf"), top, 0.0)[:, None]).exp()
    got = fused_forward(x, y, scale=scale, tile=SMALL, splits=splits, **masks)
    torch.testing.assert_close(got.shift.double(), top, **tolerance)
    torch.testing.assert_close(got.total.double(), e.sum(1), **tolerance)
    torch.testing.assert_close(got.best.double(), top / float(scale), **tolerance)
    torch.testing.assert_close(got.weighted.double(), e @ uy, **tolerance)
    factor = torch.randn(len(x), dtype=got.total.dtype, device=DEVICE)
    shift = torch.where(got.shift > float("-inf"), got.shift, float("inf"))
    d_y = fused_backward(x, y, scale=scale, shift=shift, factor=factor, tile=SMALL, splits=splits, **masks)
    torch.testing.assert_close(d_y.double(), (e * factor.double()[:, None]).T @ ux, **tolerance)
    return got


# 1 row; odd; one below, at and above a tile; several tiles and splits, the last ones ragged; D no power of two, and the greatest
@pytest.mark.parametrize(
    "rows, columns, width, splits", [(1, 3, 5, 1), (31, 33, 32, 1), (33, 31, 65, 2), (70, 130, 24, 3), (20, 40, 128, 2)]
)
def test_against_dense(rows, columns, width, splits):
    check(unit(rows, width), unit(columns, width), 20.0, splits, positive=torch.randint(0, columns, (rows,), device=DEVICE))


@pytest.mark.parametrize(
    "names", [("ids",), ("threshold",), ("keep",), ("scales",), ("ids", "second", "threshold", "keep", "scales", "offset")]
)
def test_every_mask(names):
    rows, columns, width = 37, 75, 24
    masks = dict(positive=torch.randint(0, columns, (rows,), device=DEVICE))
    if "ids" in names:
        row = torch.randint(0, 4, (rows,), device=DEVICE)
        row[5] = torch.iinfo(torch.int64).min  # matches nothing
        # beyond 32 bits: comparing the low halves alone would drop too much
        masks["ids"] = ((row, torch.randint(0, 4, (columns,), device=DEVICE) + (torch.arange(columns, device=DEVICE) % 2 << 33)),)
    if "second" in names:
        masks["ids"] += ((torch.arange(rows, device=DEVICE), torch.arange(columns, device=DEVICE)),)
    if "threshold" in names:
        masks["threshold"] = torch.randn(rows, dtype=TRUTH, device=DEVICE) * 0.2
    if "keep" in names:
        masks["keep"] = torch.rand(columns, device=DEVICE) > 0.3
    if "scales" in names:
        masks |= dict(row_scale=torch.rand(rows, dtype=TRUTH, device=DEVICE), col_scale=torch.rand(columns, dtype=TRUTH, device=DEVICE))
    if "offset" in names:
        masks |= dict(column_offset=1000, positive=masks["positive"] + 1000)
    check(unit(rows, width), unit(columns, width), torch.tensor(10.0, dtype=TRUTH, device=DEVICE), 2, **masks)


def test_rows_without_a_candidate_and_ascending_logits():
    # every tile raises every row's maximum: all that was summed before is rescaled each time
    x, y = torch.ones(3, 1, dtype=TRUTH, device=DEVICE), torch.linspace(-1, 1, 130, dtype=TRUTH, device=DEVICE)[:, None]
    check(x, y, 300.0)
    got = check(x, y, 300.0, 2, keep=torch.zeros(130, dtype=torch.bool, device=DEVICE))
    assert (got.total == 0).all() and (got.shift == float("-inf")).all() and (got.weighted == 0).all()


# 0.001: exponents of both signs in the hundreds, which the running maximum must take (float32 is no candidate for these kernels
# outside the interpreter; there the product with 1 / temperature is rounded before the maximum is taken off, on a GPU it is not)
@pytest.mark.parametrize(
    "dtype, temperature",
    [(torch.bfloat16, 0.001), (torch.float16, 0.001), (torch.bfloat16, 0.05), (torch.float16, 0.05), (torch.float32, 0.05)],
)
def test_low_precision_stays_within_twice_eager(dtype, temperature):
    x, y = unit(40, 32, dtype), unit(72, 32, dtype)
    logits, ux, uy = dense(x, y, 1 / temperature)
    p, factor = logits.softmax(1), torch.rand(40, device=DEVICE) * 1e-6  # as small as weights over batch sizes are
    got = fused_forward(x, y, scale=1 / temperature, tile=SMALL, splits=2)
    d_y = fused_backward(x, y, scale=1 / temperature, shift=got.shift, factor=factor / got.total, tile=SMALL, splits=2)
    eager = ((x @ y.T).float() / temperature).softmax(1).to(dtype)
    truth = p @ uy, (p * factor.double()[:, None]).T @ ux
    theirs = (eager @ y).double(), ((eager * factor[:, None]).to(torch.float32).T @ x.float()).double()
    for ours, other, right in zip((got.weighted / got.total[:, None], d_y), theirs, truth):
        error, budget = (ours.double() - right).norm() / right.norm(), (other - right).norm() / right.norm()
        assert error <= 2 * budget + torch.finfo(dtype).eps


def test_sums_alone_equal_sums_with_products():
    x, y = unit(40, 24), unit(50, 24)
    both, alone = fused_forward(x, y, scale=9.0, tile=SMALL), fused_forward(x, y, scale=9.0, weighted=False, tile=SMALL)
    assert alone.weighted is None and torch.equal(both.total, alone.total) and torch.equal(both.shift, alone.shift)


def test_launched_work():
    x, y = unit(64, 64, torch.bfloat16), unit(128, 64, torch.bfloat16)
    with launch_log.record() as launches:
        got = fused_forward(x, y, scale=5.0, tile=SMALL)
        fused_backward(x, y, scale=5.0, shift=got.shift, factor=got.total, tile=SMALL)
        fused_forward(x, y, scale=5.0, weighted=False, tile=SMALL)
    assert [launch.flops for launch in launches] == [4 * 64 * 128 * 64, 4 * 64 * 128 * 64, 2 * 64 * 128 * 64]
    # memory traffic is operands and results alone
    assert launches[0].bytes == 2 * (64 + 128) * 64 + 4 * 64 * (64 + 3)


def test_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="at most 128, got 300"):
        fused_forward(unit(2, 300), unit(2, 300), scale=1.0)
    half = unit(2, 16, torch.float16)
    with pytest.raises(ValueError, match="normalise first"):
        fused_forward(half, half, scale=1.0, row_scale=torch.ones(2, device=DEVICE), col_scale=torch.ones(2, device=DEVICE))
