"""The cost model's choices: the cheapest way that can be had, within the workspace, explained. Needs no GPU and no Triton."""

import itertools
import re

import pytest
import torch

from contrastive_kernels import dispatch, roofline

MIB = 1 << 20
WIDTHS = (64, 128, 768, 1536, 3584, 4096)


def plan(rows=16_384, columns=16_384, width=1536, dtype=torch.bfloat16, workspace=8192, **options):
    return dispatch.plan(rows, columns, width, dtype, workspace=int(workspace * MIB), **options)


@pytest.mark.parametrize("gpu", roofline.GPUS.values(), ids=lambda gpu: gpu.name)
def test_cheapest_way_within_the_workspace(gpu):
    for rows, width, dtype, workspace, symmetric in itertools.product(
        (512, 5000, 65_536), WIDTHS, ("bfloat16", "float16", "float32"), (16, 256, 8192), (False, True)
    ):
        made = plan(rows, rows, width, dtype, workspace, gpu=gpu, symmetric=symmetric)
        possible = [way for way in made.ways if not way.reason]
        assert made.chosen in possible and {way.path for way in made.ways} == {"exp", "chunk", "fused", "dense"} | (
            {"joint"} if symmetric else set()
        )
        assert made.chosen.seconds <= dispatch.CLOSE * min(way.seconds for way in possible)
        for way in possible:
            assert 0 < way.scratch <= workspace * MIB and 1 <= way.rows <= rows
            assert way.rows == rows or way.rows < 128 or way.rows % 128 == 0
            device, host = (sum(getattr(piece, name) * piece.times for piece in way.pieces) for name in ("seconds", "host"))
            assert way.seconds == pytest.approx(max(device, host + roofline.HOST_CALL))
        # of those that the model cannot tell apart, the one with the least scratch
        near = [way for way in possible if way.seconds <= dispatch.CLOSE * min(w.seconds for w in possible)]
        assert made.chosen.scratch == min(way.scratch for way in near)


@pytest.mark.parametrize(
    "expected, options",
    [
        ("exp", {}),
        ("chunk", dict(dtype="float16")),
        ("chunk", dict(dtype="float32")),
        ("chunk", dict(smoothing=True)),
        ("fused", dict(width=64)),  # nothing is written where writing is what takes time
        ("joint", dict(symmetric=True)),
        ("exp", dict(symmetric=True, workspace=64)),  # the whole panel has no room
        ("dense", dict(rows=1024, columns=1024, plain=True)),
        ("exp", dict(plain=True)),
        ("exp", dict(rows=65_536, columns=65_536, plain=True)),
    ],
)
def test_known_choices(expected, options):
    made = plan(**options)
    assert made.path == expected, made.text()


@pytest.mark.parametrize(
    "options, path, reason",
    [
        (dict(dtype="float16"), "exp", "no exponents"),
        (dict(dtype="float32"), "exp", "no tensor cores"),
        (dict(smoothing=True), "fused", "label smoothing"),
        (dict(width=129), "fused", "above 128"),
        (dict(dtype="float16", width=64, normalize=True), "fused", "inverse norms"),
        (dict(symmetric=True, workspace=64), "joint", "whole panel needs"),
        (dict(symmetric=True, dtype="float32"), "joint", "no tensor cores"),
    ],
)
def test_every_refusal_has_its_reason(options, path, reason):
    made = plan(**options)
    way = next(way for way in made.ways if way.path == path)
    assert reason in way.reason and f"cannot: {way.reason}" in made.text()


def test_more_workspace_is_never_slower():
    for width, dtype in itertools.product(WIDTHS, ("bfloat16", "float32")):
        seconds = [
            min(way.seconds for way in plan(20_000, 70_000, width, dtype, workspace).ways if not way.reason)
            for workspace in (8, 64, 256, 1024, 8192)
        ]
        assert all(a >= b * 0.999 for a, b in zip(seconds, seconds[1:]))


def test_no_room_for_a_row():
    with pytest.raises(ValueError, match=r"room for one row of 1000000 exponentials .* got 0\.50 MiB; raise workspace_mib"):
        plan(8, 1_000_000, 1536, workspace=0.5)


def test_explanation_adds_up(capsys):
    assert dispatch.main(["--rows", "8192", "--columns", "16384", "--width", "1536", "--gpu", "a100", "--workspace-mib", "128"]) == 0
    text = capsys.readouterr().out
    assert "8192 rows x 16384 candidates x D=1536 bfloat16 on a100" in text and "PREDICTED" in text
    pieces = [float(found) for found in re.findall(r"ms each,\s+([\d.]+) ms", text)]
    together = float(re.search(r"device, together\s+([\d.]+) ms", text)[1])
    count, host = re.search(r"the host, (\d+) launches\s+([\d.]+) ms", text).groups()
    times = [int(found) for found in re.findall(r"^ +(\d+) x ", text, re.M)]
    assert int(count) == sum(times) and 0 < float(host) < together
    limit, ratio = re.search(r"by the library\s+([\d.]+) ms: ([\d.]+) times", text).groups()
    assert len(pieces) > 5 and sum(pieces) == pytest.approx(together, abs=0.01)
    assert together / float(limit) == pytest.approx(float(ratio), abs=0.002)
    assert "not chunk" in text and "not fused cannot: D=1536 is above 128" in text
    assert "tiles of 128 x 256" in text and "plain torch through autograd" in text
    said = []
    made = plan(explain=said.append)
    assert said == [made.text()] and plan() == made  # the same arguments, the same plan


def test_levels_are_explained_too(capsys):
    shape = ["--rows", "16384", "--columns", "16384"]
    assert dispatch.main([*shape, "--dims", "256", "512", "1024"]) == 0
    text = capsys.readouterr().out
    assert "D=[256, 512, 1024] bfloat16 on h100" in text and ("not levels" in text or "not apart" in text)
    assert dispatch.main([*shape, "--dims", "256", "512", "--dtype", "float16"]) == 0
    assert "not levels cannot: float16 has no exponents" in capsys.readouterr().out
    for wrong in ([], ["--dims", "64", "128", "--width", "128"], ["--dims", "64", "128", "--symmetric"]):
        with pytest.raises(SystemExit):
            dispatch.main([*shape, *wrong])


def test_measured_rates_change_the_choice():
    """The model is a model: a GPU whose memory is slow writes no float32 logits."""
    import dataclasses

    slow = dataclasses.replace(roofline.H100, bandwidth=0.2e12)
    assert plan(width=128, gpu=slow).path == "fused"
    assert plan(width=1536, gpu=slow, dtype="float16").ways[1].seconds > 2 * plan(width=1536, dtype="float16").ways[1].seconds


def test_small_losses_are_launches():
    """The fewest launches win where launches are what a loss takes, and plain torch through autograd is not much quicker anywhere."""
    for rows in (64, 256, 1024, 2048, 4096, 16_384, 65_536):
        made = plan(rows, rows, plain=True)
        assert (made.path == "dense") == (rows <= 4096), made.text()
        assert made.chosen.seconds <= made.rival
        assert rows < 4096 or made.chosen.seconds <= 0.6 * made.rival
    assert plan(256, 256, plain=True, interpreted=True).path != "dense"  # the interpreter is there to run the kernels
    assert "only a loss without options" in next(way.reason for way in plan(256, 256).ways if way.path == "dense")


# masked: with masks and the rows' maxima. On sm_80 and sm_90 masks alone fit the wide tile, and large panels need no maxima
@pytest.mark.parametrize(
    "gpu, plain, masked", [("h100", (256, 128), (128, 128)), ("a100", (128, 256), (128, 64)), ("b200", (128, 256), (128, 128))]
)
def test_the_tile_that_is_taken_is_priced(gpu, plain, masked):
    gpu = roofline.GPUS[gpu]

    def taken(**options):
        return next(way for way in plan(gpu=gpu, **options).ways if way.path == "exp")

    wide, narrow = taken(), taken(masks=True, best=True)
    assert (wide.tile, narrow.tile) == (plain, masked) and narrow.seconds > wide.seconds
    assert taken(normalize=True).tile == plain
    alone = masked if gpu.name == "b200" else plain
    assert taken(masks=True).tile == taken(columns=16_385).tile == alone
    assert taken(rows=4096, columns=4096, masks=True).tile == masked  # small: maxima tell which rows are unsafe


def test_explanation_tells_of_the_unmeasured_panel_and_of_the_same_losses_rival():
    assert "not warp_specialised: nobody has measured it here yet" in plan().text() and "copies no tiles" in plan(gpu=roofline.A100).text()
    assert plan(normalize=True).rival > plan().rival and plan(symmetric=True).rival > 1.9 * plan().rival
    assert plan(masks=True).rival == 0 and "plain torch" not in plan(masks=True).text()


def test_a_card_is_told_by_its_name():
    assert roofline.for_arch(90, "NVIDIA H200") is roofline.H200 and roofline.for_arch(90, "NVIDIA H100 80GB HBM3") is roofline.H100
    assert roofline.for_arch(90) is roofline.H100 and roofline.for_arch(80, "NVIDIA A10") is roofline.A100
