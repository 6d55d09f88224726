"""`python -m bench gpu --record`: a run's results become committed files, rates of the cost model, and a page of predictions."""

import csv
import json
import subprocess
import sys

import pytest

from tests.helpers.repository import ROOT

pytest.importorskip("triton")

from bench.gpu import record

ABOUT = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc1234", "dry": False}
SHAPE = {"n": 16_384, "m": 16_384, "d": 1536}
ROWS = [
    {"part": "env", "name": "library product, bfloat16", "value": 771.0, "unit": "TFLOP/s", "predicted": 700.0},
    {"part": "env", "name": "memory, read and written", "value": 2.91, "unit": "TB/s", "predicted": 3.0},
    {"part": "env", "name": "launch, in a CUDA graph", "value": 1.5, "unit": "us", "predicted": 2.2},
    {"part": "profile", "name": "plain panel: Triton share of the library's rate", "value": 0.81, "unit": "", "predicted": 0.85},
    {"part": "loss", "name": "ours", **SHAPE, "ms_p50": 4.25, "times_three_gemms": 1.316},
    {"part": "loss", "name": "eager", **SHAPE, "ms_p50": 9.5, "times_three_gemms": 2.94},
    {"part": "train", "name": "7b, peak of memory", "value": 31.5, "unit": "GiB", "predicted": 30.8, "measured_over_predicted": 1.023},
]


@pytest.fixture
def checkout(tmp_path):
    """A root with the files that are written, and a folder of results; `write(about, rows)` makes another run."""
    root, folder = tmp_path / "root", tmp_path / "run"
    for name in ("docs/performance.md", "kernels/contrastive_kernels/roofline/measured.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text((ROOT / name).read_text())
    (root / "kernels/contrastive_kernels/roofline/measured.py").write_text('"""Rates."""\n\nRATES: dict[str, dict[str, float]] = {}\n')
    folder.mkdir()

    def write(about=ABOUT, rows=ROWS, complaints=(), notes=()):
        whole = {"about": about, "rows": rows, "complaints": list(complaints), "notes": list(notes)}
        (folder / "results.json").write_text(json.dumps(whole))
        return folder

    write()
    return root, folder, write


def rates_in(root):
    scope = {}
    exec((root / "kernels/contrastive_kernels/roofline/measured.py").read_text(), scope)
    return scope["RATES"]


def test_results_rates_and_page(checkout):
    root, folder, _ = checkout
    assert record.main(folder, root) == 0
    kept = root / "bench/results/nvidia-h100-80gb-hbm3"
    assert json.loads((kept / "results.json").read_text())["rows"] == ROWS
    with (kept / "results.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row["name"] for row in ROWS]
    assert rates_in(root) == {"h100": {"achieved": 7.71e14, "bandwidth": 2.91e12, "launch": 1.5e-6, "triton_share": 0.81}}
    page = (root / "docs/performance.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| 16,384 | 1,536 | ours |"))
    assert line.endswith("| 4.25 (1.32x) |") and "PREDICTED" in page and "x) | 4.25" in line
    assert "31.50 GiB (1.02 of its plan)" in page and "771 TFLOP/s" in page and "700 TFLOP/s" in page
    assert record.NOTHING in next(line for line in page.splitlines() if line.startswith("| 65,536 | 1,536 | ours |"))
    before = page
    assert record.main(None, root) == 0 and (root / "docs/performance.md").read_text() == before


def test_the_cost_model_takes_what_was_measured(checkout):
    root, folder, _ = checkout
    record.main(folder, root)
    code = (
        "import sys, importlib.util as u; sys.path.insert(0, sys.argv[1]); name = 'contrastive_kernels.roofline.measured';"
        "spec = u.spec_from_file_location(name, sys.argv[2]);"
        "m = u.module_from_spec(spec); spec.loader.exec_module(m); sys.modules[name] = m;"
        "from contrastive_kernels import dispatch, roofline as r;"
        "t = lambda g: dispatch.plan(16384, 16384, 1536, 'bfloat16', workspace=8 << 30, gpu=g).chosen.seconds;"
        "print(r.H100.achieved, r.H100.bandwidth, r.H100.launch, r.H100.triton_share);"
        "print(r.A100 == r.ASSUMED['a100'], t(r.H100) < t(r.ASSUMED['h100']))"
    )
    command = [sys.executable, "-c", code, str(ROOT / "kernels"), str(root / "kernels/contrastive_kernels/roofline/measured.py")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert [float(value) for value in out[:4]] == [7.71e14, 2.91e12, 1.5e-6, 0.81] and out[4:] == ["True", "True"]


def test_another_card_and_a_part_that_ran_again(checkout):
    root, folder, write = checkout
    record.main(folder, root)
    write({**ABOUT, "device": "NVIDIA H200", "commit": "def"}, [{**ROWS[0], "value": 780.0}])
    record.main(folder, root)
    assert rates_in(root)["h200"] == {"achieved": 7.8e14} and rates_in(root)["h100"]["launch"] == 1.5e-6
    assert "measured, NVIDIA H100 80GB HBM3 | measured, NVIDIA H200 |" in (root / "docs/performance.md").read_text()
    again = [{**row, "ms_p50": 4.0, "times_three_gemms": 1.2} for row in ROWS if row["part"] == "loss" and row["name"] == "ours"]
    bad = {"part": "smoke", "name": "attention", "text": "TypeError: no"}
    write({**ABOUT, "commit": "new5678"}, again, [bad], [{"part": "gate", "name": "the whole part", "text": "skipped: no time left"}])
    record.main(folder, root)
    kept = json.loads((root / "bench/results/nvidia-h100-80gb-hbm3/results.json").read_text())
    assert [row["part"] for row in kept["rows"]] == ["env", "env", "env", "profile", "train", "loss"]  # eager's row was of the earlier run
    assert kept["rows"][0]["commit"] == "abc1234" and kept["complaints"] == [bad]
    page = (root / "docs/performance.md").read_text()
    assert "4.00 (1.20x)" in page and "smoke: attention: TypeError: no" in page


@pytest.mark.parametrize("about, complaint", [({**ABOUT, "dry": True}, "dry run"), (None, "there is none")])
def test_what_is_no_measurement_is_refused(checkout, capsys, about, complaint):
    root, folder, write = checkout
    write(about) if about else (folder / "results.json").unlink()
    assert record.main(folder, root) == 1
    assert complaint in capsys.readouterr().err and rates_in(root) == {} and not (root / "bench").exists()


def test_the_committed_page_is_what_the_command_writes(tmp_path):
    """After a change of the cost model or of a plan: python -m bench gpu --record"""
    text = (ROOT / "docs/performance.md").read_text()
    between = text.split(record.BEGIN)[1].split(record.END)[0].strip()
    assert between == record.page(record.recorded(ROOT)).strip()


def test_recorded_results_can_be_committed():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")

    def ignored(path):
        return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0

    assert not ignored("bench/results/nvidia-h100-80gb-hbm3/results.json") and ignored("bench/scratch/gpu/results.json")


def test_a_prediction_is_not_fitted_to_its_outcome(monkeypatch):
    """Rates that were recorded change what dispatch takes, and not what the page says was predicted."""
    import dataclasses

    from contrastive_kernels import roofline

    before = record.page([])
    slow = dataclasses.replace(roofline.H100, achieved=300e12, bandwidth=1e12)
    monkeypatch.setattr(roofline, "H100", slow)
    monkeypatch.setitem(roofline.GPUS, "h100", slow)
    assert record.page([]) == before
