"""A run that was killed at random moments, or interrupted, ends with the weights of one that was not: bit for bit on one thread."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_recipe

from train import checkpoints

STEPS = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


def start(recipe):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "train", str(recipe)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def until_training(process):
    """Reads the output up to the line that says training begins, or was finished before; returns it."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(("starting from", "resuming from")) or "is already trained" in line:
            return line
    raise AssertionError(f"ended with {process.wait()} before training began: {''.join(lines)}")


def finish(process):
    text = process.stdout.read()
    assert process.wait() == 0, text


def make(root, name):
    recipe = write_recipe(root, output=str(root / name), steps=STEPS, save_steps=2)
    # Dropout: a resumed run that did not restore the generators would differ.
    path = root / "model" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["attention_dropout"] = 0.1
    path.write_text(json.dumps(config))
    return recipe


def until_checkpoint(process, folder, step):
    """Waits for the first complete checkpoint at or after a step, or for the end of the run."""
    while process.poll() is None:
        if any(int(path.name.rsplit("-", 1)[1]) >= step for path in checkpoints.complete_checkpoints(folder)):
            return
        time.sleep(0.002)


@pytest.fixture(scope="module")
def uninterrupted(root):
    """Weights of a run that nobody disturbed."""
    process = start(make(root, "whole"))
    until_training(process)
    finish(process)
    return load_file(root / "whole" / "model.safetensors")


def assert_same_weights(folder, expected):
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    assert not torch.equal(value, load_file(folder.parent / "model" / "model.safetensors")[name]), "nothing was trained"


def test_killed_at_random_moments(root, uninterrupted):
    seed = random.SystemRandom().randrange(10**6)
    moments = random.Random(seed)
    recipe, resumed = make(root, "killed"), 0
    for reach in (2, 6, 10):
        process = start(recipe)
        resumed += until_training(process).startswith("resuming")
        until_checkpoint(process, root / "killed", reach)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.wait()
        process.stdout.close()
        for folder in checkpoints.complete_checkpoints(root / "killed"):
            load_file(folder / "model.safetensors")  # none is half there
    process = start(recipe)
    until_training(process)
    finish(process)
    assert resumed, f"the first kill came after the end (seed {seed})"
    assert_same_weights(root / "killed", uninterrupted)


def test_interrupted_from_the_keyboard(root, uninterrupted):
    recipe = make(root, "interrupted")
    process = start(recipe)
    until_training(process)
    until_checkpoint(process, root / "interrupted", 2)
    process.send_signal(signal.SIGINT)
    text = process.stdout.read()
    assert process.wait() == 130, text
    assert "the same command goes on from there" in text and "Traceback" not in text
    step = checkpoints.complete_checkpoints(root / "interrupted")[-1].name
    process = start(recipe)
    assert step in until_training(process)
    finish(process)
    assert_same_weights(root / "interrupted", uninterrupted)
