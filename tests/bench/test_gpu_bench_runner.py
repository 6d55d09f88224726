"""The runner of `python -m bench gpu` over processes that die, hang or lose the device; its exit codes, clock and command line."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from bench.gpu import child
from bench.gpu import run as runner
from bench.gpu.check import Check, Machine, NotHere
from tests.helpers.repository import ROOT

CHILD = [sys.executable, str(ROOT / "tests/workers/fake_gpu_child.py")]


@pytest.fixture
def run(tmp_path):
    """Runs parts, dry, with children that only pretend; returns (exit code, results)."""

    def run(*parts, minutes=5.0):
        import argparse

        parser = argparse.ArgumentParser()
        runner.add_arguments(parser)
        args = parser.parse_args(["--dry", "--parts", *parts, "--minutes", str(minutes), "--output", str(tmp_path / "out")])
        code = runner.run(args, CHILD)
        return code, json.loads((tmp_path / "out/results.json").read_text())

    return run


def names(found, kind="rows"):
    return [row["name"] for row in found[kind]]


def test_a_process_that_dies_or_loses_the_device_costs_one_check(run):
    code, found = run("env")
    assert code == 1 and names(found) == ["a", "b", "c"] and names(found, "complaints") == ["die", "lost"]
    assert "ended with 7" in found["complaints"][0]["text"]


def test_a_check_that_hangs_is_ended_and_the_next_one_runs(run):
    began = time.monotonic()
    code, found = run("smoke")
    assert (
        code == 1 and names(found) == ["a", "b"] and names(found, "complaints") == ["hang"] and time.monotonic() - began < 300
    )  # of the 600 that it would sleep
    assert "hangs" in found["complaints"][0]["text"]


def test_a_part_is_given_up_after_some_processes(run):
    _, found = run("loss")
    assert names(found, "complaints") == ["die 1", "die 2", "die 3", "die 4", "die 5", "the rest of the part"] and found["rows"] == []


def test_a_part_that_does_not_start_is_told_once(run):
    code, found = run("train", "env")
    assert code == 1 and names(found, "complaints") == ["die", "lost", "start"] and "cannot start" in found["complaints"][2]["text"]


def test_what_peers_do_is_a_note(run):
    code, found = run("peers")
    assert code == 0 and found["complaints"] == [] and names(found, "notes") == ["die", "wrong"] and names(found) == ["wrong", "b"]


def test_checks_are_shared_between_processes(run, monkeypatch):
    monkeypatch.setattr(runner, "processes_of", lambda part, dry: 3)
    code, found = run("gate")
    assert code == 0 and sorted(names(found)) == [f"check {number}" for number in range(7)]


def test_what_does_not_fit_in_the_minutes_is_told(run):
    began = time.monotonic()
    code, found = run("attention", minutes=0.1)
    assert (
        code == 0 and names(found, "notes") == ["slow"] and "no time left" in found["notes"][0]["text"] and time.monotonic() - began < 200
    )
    code, found = run("env", "smoke", minutes=0.01)
    assert code == 0 and [note["text"] for note in found["notes"]] == ["skipped: no time left"] * 2 and found["rows"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_cuda_it_says_so(capsys):
    assert runner.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_command_works_from_a_bare_checkout(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = (
        "import bench.__main__ as m; m.use_this_checkout(); import contrastive_kernels, vlm2vec, train, os;"
        "print(contrastive_kernels.__file__, vlm2vec.__file__, os.environ['PYTHONPATH'])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert out.split() == [f"{ROOT}/kernels/contrastive_kernels/__init__.py", f"{ROOT}/vlm2vec/__init__.py", f"{ROOT}/kernels:{ROOT}"]
    helped = subprocess.run([sys.executable, "-m", "bench", "gpu", "--help"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert helped.returncode == 0 and "--output DIR" in helped.stdout and "bench/scratch/gpu" in helped.stdout


def attempted(run, ours=True):
    said = []
    going = child.attempt(Check("it", run, ours), Machine("cpu"), lambda **message: said.append(message))
    assert said[0]["kind"] == "start"
    return going, said[1]


@pytest.mark.parametrize(
    "text, lost",
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: device-side assert triggered", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("CUDA error: out of memory", False),
        ("expected 3, got 4", False),
    ],
)
def test_errors_that_lose_the_device_end_the_process(text, lost):
    def run():
        raise RuntimeError(text)

    going, said = attempted(run)
    assert going is not lost and said["kind"] == "failed" and text in said["text"] and ("lost the device" in said["text"]) is lost


def test_missing_packages_of_peers_are_notes_and_of_ours_failures():
    def run():
        raise ModuleNotFoundError("No module named 'memeff'")

    said = attempted(run, ours=False)[1]
    assert (said["kind"], said["text"]) == ("note", "not installed: No module named 'memeff'")
    assert attempted(run)[1]["kind"] == "failed"


def test_what_needs_cuda_is_a_note():
    def run():
        raise NotHere("needs CUDA")

    assert attempted(run)[1] == {"kind": "note", "name": "it", "text": "needs CUDA"}
