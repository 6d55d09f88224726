"""The warp-specialised panel against dense float64; descriptors work in the interpreter, warp groups are seen by test_aot.py alone."""

import threading

import pytest
import torch

pytest.importorskip("triton")

import triton

from contrastive_kernels.triton import configs, launch_log
from contrastive_kernels.triton.kernels import warp_specialised
from contrastive_kernels.triton.kernels.exp_panel import exp_panel
from tests.kernels.helpers.panel_inputs import DEVICE, TIGHT, TRUTH, dense, poisoned, unit

SMALL = configs.Tile(32, 32, 32, 4, 1, group=2)
if DEVICE == "cuda":  # the types and tiles that it has there
    if configs.tuned_as(configs.architecture(torch.device(DEVICE))) not in warp_specialised.FIRST_TRITON:
        pytest.skip("needs sm_90 or sm_100", allow_module_level=True)
    SMALL, TRUTH, TIGHT = None, torch.bfloat16, dict(rtol=2e-2, atol=1e-6)  # E is rounded to bfloat16


def close(got, expected):
    torch.testing.assert_close(got.double(), expected.double(), **TIGHT)


# 1 row; a block; one below and above a block; wider than two blocks and a group of two row tiles, ragged both ways; D that no block divides
SHAPES = [(1, 8, 5), (32, 32, 32), (31, 64, 64), (33, 40, 65), (130, 104, 40)]


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("rows, columns, width", SHAPES)
def test_against_dense(rows, columns, width, scales, store):
    x, y = unit(rows, width, TRUTH), unit(columns, width, TRUTH)
    kind = torch.float32 if TRUTH == torch.bfloat16 else TRUTH
    shift = torch.full((rows,), 3.0, dtype=kind, device=DEVICE)
    shift[rows // 2] = float("inf")  # a row without part
    options = dict(positive=torch.randint(0, columns, (rows,), device=DEVICE) + 1000)
    options["positive"][0] = -1
    if scales:
        options |= dict(row_scale=torch.rand(rows, dtype=kind, device=DEVICE), col_scale=torch.rand(columns, dtype=kind, device=DEVICE))
    out = poisoned(1, rows, columns, dtype=TRUTH) if store else None
    with launch_log.record() as launches:
        got = exp_panel(
            x, y, scale=20.0, shift=shift, out=out, store=store, column_offset=1000, tile=SMALL, panel="warp_specialised", **options
        )
    assert [launch.name for launch in launches] == ["exp_panel_warp_specialised"]
    e, _, kept = dense(x, y, 20.0, shift, offset=1000, **options)
    if store:
        close(got.e[0], e)
        assert torch.equal(got.e[0] != 0, kept & (shift != float("inf"))[:, None])
    close(got.row_sum[0], e.sum(1))


def test_bfloat16_is_as_good_as_the_plain_panel():
    x, y = unit(70, 96, torch.bfloat16), unit(136, 96, torch.bfloat16)
    shift, positive = torch.full((70,), 1 / 0.02 - 60, device=DEVICE), torch.arange(70, device=DEVICE)
    truth, _, _ = dense(x, y, 50.0, shift, positive)
    errors = {}
    for panel in ("plain", "warp_specialised"):
        got = exp_panel(x, y, scale=50.0, shift=shift, positive=positive, panel=panel)
        off = (got.e[0].double() - truth).abs() / truth.clamp_min(1e-300)
        errors[panel] = off.max(), ((got.row_sum[0].double() - truth.sum(1)).abs() / truth.sum(1)).max()
    for ours, plain, unit_of in zip(errors["warp_specialised"], errors["plain"], (torch.bfloat16, torch.float32)):
        assert ours <= 2 * plain + torch.finfo(unit_of).eps


def test_a_panel_inside_a_wider_buffer():
    # the descriptors' strides: rows of a view, E between columns that stay as they are
    x, y = unit(40, 128)[::2, :64], unit(48, 64)
    out = poisoned(1, 20, 64, dtype=x.dtype)
    shift = torch.zeros(20, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=DEVICE)
    got = exp_panel(
        x.to(TRUTH),
        y.to(TRUTH),
        scale=1.0,
        shift=shift,
        out=out[:, :, :48].to(TRUTH) if TRUTH != x.dtype else out[:, :, :48],
        tile=SMALL,
        panel="warp_specialised",
    )
    close(got.e[0], dense(x, y, 1.0, shift)[0])
    assert TRUTH != x.dtype or out[:, :, 48:].isnan().all()


def test_nan_and_infinity_are_seen():
    for bad in (float("nan"), float("inf")):
        x, y = unit(5, 32, TRUTH), unit(40, 32, TRUTH)
        x[2, 3] = bad
        shift = torch.zeros(5, dtype=torch.float32 if TRUTH == torch.bfloat16 else TRUTH, device=DEVICE)
        total = exp_panel(x, y, scale=1.0, shift=shift, tile=SMALL, panel="warp_specialised").row_sum[0]
        assert not total[2].isfinite() and total[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("option", ["ids", "threshold", "keep", "row_max", "col_sum", "levels", "redo", "columns"])
def test_what_it_has_not_is_refused(option):
    rows, columns = 4, 6 if option == "columns" else 8
    x, y, shift = unit(rows, 32, torch.bfloat16), unit(columns, 32, torch.bfloat16), torch.zeros(rows, device=DEVICE)

    def number(count, dtype=torch.int64):
        return torch.zeros(count, dtype=dtype, device=DEVICE)

    options = dict(
        ids=((number(rows), number(columns)),),
        threshold=number(rows, torch.float32),
        keep=number(columns, torch.bool),
        row_max=True,
        col_sum=True,
        levels=torch.tensor([32], dtype=torch.int32, device=DEVICE),
        redo=number(1, torch.int32),
    )
    taken = {} if option == "columns" else {option: options[option]}
    with pytest.raises(ValueError, match="panel='warp_specialised'.*use panel='auto'"):
        exp_panel(x, y, scale=1.0, shift=shift, panel="warp_specialised", **taken)
    exp_panel(x, y, scale=1.0, shift=shift, panel="auto", **taken)


def test_obstacles_of_a_gpu():
    asked = dict(plain=True, columns=1024, interpreted=False)
    assert not warp_specialised.obstacle(90, torch.bfloat16, version="3.6.0", **asked)
    assert not warp_specialised.obstacle(100, torch.float16, version="3.10.1", **asked)
    assert "3.6.0 cannot specialise" in warp_specialised.obstacle(100, torch.bfloat16, version="3.6.0", **asked)
    assert "8.0 has no tensor memory" in warp_specialised.obstacle(80, torch.bfloat16, **asked)
    assert "12.0 has no tensor memory" in warp_specialised.obstacle(120, torch.bfloat16, **asked)
    assert "tensor cores" in warp_specialised.obstacle(90, torch.float32, **asked)


def test_unmeasured_it_is_not_taken_by_itself(monkeypatch):
    x, shift = unit(8, 32, torch.bfloat16), torch.zeros(8, device=DEVICE)
    with pytest.raises(ValueError, match="auto, plain, warp_specialised, got 'fast'"):
        exp_panel(x, x, scale=1.0, shift=shift, panel="fast")
    for measured, name in ((frozenset(), "exp_panel"), (frozenset({0, 90, 100}), "exp_panel_warp_specialised")):
        monkeypatch.setattr(configs, "WARP_SPECIALISED_FASTER", measured)
        with launch_log.record() as launches:
            exp_panel(x, x, scale=1.0, shift=shift)
        assert launches[0].name == name


def test_descriptors_memory_comes_from_torch_and_leaves_the_programs_setting(monkeypatch):
    """Triton asks for memory by a setting of the context: another thread's launches have none, and a program may have its own."""
    asked = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: asked.append(_allocation()(256, 128, None))

    def _allocation():
        from triton.runtime import _allocation

        return _allocation._allocator.get()

    monkeypatch.setattr(warp_specialised, "_warp_specialised_kernel", Kernel())
    monkeypatch.setattr(warp_specialised, "scratch", lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    x, shift = unit(8, 32, torch.bfloat16), torch.zeros(8, device=DEVICE)

    def mine(size, alignment, stream):
        raise AssertionError("the program's own allocator was asked")

    before = _allocation()
    try:
        triton.set_allocator(mine)
        thread = threading.Thread(target=exp_panel, args=(x, x), kwargs=dict(scale=1.0, shift=shift, panel="warp_specialised"))
        thread.start()
        thread.join()
        exp_panel(x, x, scale=1.0, shift=shift, panel="warp_specialised")
        assert _allocation() is mine
    finally:
        triton.set_allocator(before)
    assert [memory.numel() for memory in asked] == [256, 256]
