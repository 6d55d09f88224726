"""Logits product with exponential epilogue, against dense float64."""

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels.triton import configs, launch_log
from contrastive_kernels.triton.kernels.chunk_panel import chunk_reduce
from contrastive_kernels.triton.kernels.common import dot_precision
from contrastive_kernels.triton.kernels.exp_panel import exp_panel
from contrastive_kernels.triton.kernels.fused import fused_backward, fused_forward
from tests.kernels.helpers.panel_inputs import DEVICE, TIGHT, TRUTH, dense, poisoned, unit

SMALL = configs.Tile(32, 32, 32, 4, 1, 2)


def close(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), **TIGHT)


# 1 row; odd; one below, at and above a block; wider than two blocks; D below, across and beyond BLOCK_K
SHAPES = [(1, 3, 5), (31, 33, 32), (32, 64, 64), (33, 31, 65), (70, 100, 40)]


@pytest.mark.parametrize("rows, columns, width", SHAPES)
def test_float64_is_exact(rows, columns, width):
    x, y = unit(rows, width), unit(columns, width)
    shift = torch.full((rows,), 3.0, dtype=TRUTH, device=DEVICE)
    positive = torch.randint(0, columns, (rows,), device=DEVICE)
    out = poisoned(1, rows, columns, dtype=TRUTH)
    got = exp_panel(x, y, scale=20.0, shift=shift, out=out, positive=positive, row_max=True, col_sum=True, tile=SMALL)
    e, best, _ = dense(x, y, 20.0, shift, positive)
    close(got.e[0], e)
    close(got.row_sum[0], e.sum(1))
    close(got.col_sum[0], e.sum(0))
    close(got.row_max[0], best)


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("ids",),
        ("ids", "second"),
        ("threshold",),
        ("keep",),
        ("scales",),
        ("offset",),
        ("ids", "second", "threshold", "keep", "scales", "offset"),
    ],
)
def test_every_mask(names):
    rows, columns, width = 37, 75, 48
    x, y = unit(rows, width), unit(columns, width)
    options = dict(positive=torch.randint(0, columns, (rows,), device=DEVICE))
    if "ids" in names:
        row_ids = torch.randint(0, 4, (rows,), device=DEVICE)
        row_ids[5] = torch.iinfo(torch.int64).min  # a row that matches nothing
        # beyond 32 bits: a comparison of the low halves alone would drop too much
        options["ids"] = ((row_ids, torch.randint(0, 4, (columns,), device=DEVICE) + (torch.arange(columns, device=DEVICE) % 2 << 33)),)
    if "second" in names:
        options["ids"] += ((torch.arange(rows, device=DEVICE), torch.arange(columns, device=DEVICE)),)
    if "threshold" in names:
        options["threshold"] = torch.randn(rows, dtype=TRUTH, device=DEVICE) * 0.2
    if "keep" in names:
        options["keep"] = torch.rand(columns, device=DEVICE) > 0.3
    if "scales" in names:
        options["row_scale"] = torch.rand(rows, dtype=TRUTH, device=DEVICE)
        options["col_scale"] = torch.rand(columns, dtype=TRUTH, device=DEVICE)
    offset = 1000 if "offset" in names else 0
    options["positive"] = options["positive"] + offset
    shift = torch.full((rows,), 1.0, dtype=TRUTH, device=DEVICE)
    shift[3] = float("inf")
    got = exp_panel(
        x, y, scale=torch.tensor(10.0, dtype=TRUTH, device=DEVICE), shift=shift, row_max=True, column_offset=offset, tile=SMALL, **options
    )
    e, best, kept = dense(x, y, 10.0, shift, offset=offset, **options)
    close(got.e[0], e)
    assert torch.equal(got.e[0] != 0, kept & (shift != float("inf"))[:, None])
    close(got.row_sum[0], e.sum(1))
    close(got.row_max[0], best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_within_twice_eager(dtype):
    x, y = unit(40, 96, dtype), unit(72, 96, dtype)
    shift = torch.full((40,), 1 / 0.02 - 60, device=DEVICE)
    truth, _, _ = dense(x, y, 50.0, shift)
    eager = (x.float() @ y.float().T * 50.0 - shift[:, None]).exp()
    got = exp_panel(x, y, scale=50.0, shift=shift, tile=SMALL)
    budget = 2 * ((eager.to(dtype).double() - truth) / truth).abs().max() + torch.finfo(dtype).eps
    assert ((got.e[0].double() - truth) / truth).abs().max() <= budget
    # the sums are those of E before rounding: float32 whatever the operands
    budget = 2 * ((eager.double().sum(1) - truth.sum(1)) / truth.sum(1)).abs().max() + torch.finfo(torch.float32).eps
    assert ((got.row_sum[0].double() - truth.sum(1)) / truth.sum(1)).abs().max() <= budget


def test_prefixes_in_one_sweep():
    rows, columns, dims = 33, 40, (32, 64, 96)
    x, y = unit(rows, 96), unit(columns, 96)

    def inverse(m):
        return torch.stack([1 / m[:, :d].norm(dim=1) for d in dims])

    row_scale, col_scale = inverse(x), inverse(y)
    shift = torch.zeros(3, rows, dtype=TRUTH, device=DEVICE)
    threshold = torch.rand(3, rows, dtype=TRUTH, device=DEVICE) * 0.5
    positive = torch.arange(rows, device=DEVICE)
    got = exp_panel(
        x,
        y,
        scale=5.0,
        shift=shift,
        row_scale=row_scale,
        col_scale=col_scale,
        positive=positive,
        threshold=threshold,
        levels=torch.tensor(dims, dtype=torch.int32, device=DEVICE),
        row_max=True,
        col_sum=True,
        tile=SMALL,
    )
    for level, d in enumerate(dims):
        e, best, _ = dense(
            x[:, :d],
            y[:, :d],
            5.0,
            shift[level],
            positive,
            threshold=threshold[level],
            row_scale=row_scale[level],
            col_scale=col_scale[level],
        )
        close(got.e[level], e)
        close(got.row_sum[level], e.sum(1))
        close(got.col_sum[level], e.sum(0))
        close(got.row_max[level], best)


def test_redo_touches_marked_tiles_only():
    x, y = unit(70, 32), unit(40, 32)
    shift = torch.zeros(70, dtype=TRUTH, device=DEVICE)
    out = poisoned(1, 70, 40, dtype=TRUTH)
    redo = torch.tensor([0, 1, 0], dtype=torch.int32, device=DEVICE)
    exp_panel(x, y, scale=5.0, shift=shift, out=out, redo=redo, tile=SMALL)
    assert out[0, :32].isnan().all() and out[0, 64:].isnan().all()
    close(out[0, 32:64], dense(x, y, 5.0, shift)[0][32:64])


def test_strided_rows_and_transposed_input():
    x = unit(40, 130)[::2, 3:67]  # a view with strides, and a matrix whose width is not contiguous
    y = unit(64, 24).T
    shift = torch.zeros(20, dtype=TRUTH, device=DEVICE)
    got = exp_panel(x, y, scale=1.0, shift=shift, tile=SMALL)
    close(got.e[0], dense(x, y, 1.0, shift)[0])


def test_launched_work_is_what_the_loss_needs():
    with launch_log.record() as launches:
        x, y = unit(64, 64, torch.bfloat16), unit(128, 64, torch.bfloat16)
        exp_panel(x, y, scale=1.0, shift=torch.zeros(64, device=DEVICE), tile=SMALL)
    assert launches[0].flops == 2 * 64 * 128 * 64 and launches[0].grid == 8


@pytest.mark.parametrize("offset, columns", [(0, 1 << 31), ((1 << 31) - 130, 2)])
def test_columns_beyond_32_bits_are_refused(offset, columns):
    x, shift = torch.zeros(1, 4, device=DEVICE), torch.zeros(1, device=DEVICE)
    y, cos = x.expand(columns, 4), torch.zeros(1, 1, device=DEVICE).expand(1, columns)
    for run in (
        lambda: exp_panel(x, y, scale=1.0, shift=shift, column_offset=offset),
        lambda: fused_forward(x, y, scale=1.0, column_offset=offset),
        lambda: fused_backward(x, y, scale=1.0, shift=shift, factor=shift, column_offset=offset),
        lambda: chunk_reduce(cos, scale=1.0, column_offset=offset),
    ):
        with pytest.raises(ValueError, match="at most 2147483519 columns .* fewer a call"):
            run()


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_float32_products_follow_the_setting_of_torch(setting, monkeypatch):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting  # from here on torch refuses to say what the older switch is
        assert dot_precision(torch.float32) == setting and dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_refuses_integers():
    with pytest.raises(ValueError, match="bfloat16"):
        exp_panel(torch.ones(2, 4, dtype=torch.int32), torch.ones(2, 4, dtype=torch.int32), scale=1.0, shift=torch.zeros(2))
