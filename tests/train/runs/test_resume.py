"""A run that was interrupted goes on where it stopped: with equal weights, the next rows and nothing read or decoded twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.repository import ROOT
from tests.helpers.tiny_recipe import write_recipe
from train import checkpoints
from train.data.media_stream import Media
from train.data.rows import PairDataset
from train.data.sampler import BlockSampler
from train.recipe.schema import load_recipe
from train.run import run
from train.trainer import ContrastiveTrainer

STEPS = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


def start(recipe):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "train", str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    )


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


class Killed(BaseException):
    """Nothing may catch it: what follows finds the disk as kill -9 would have left it."""


@pytest.fixture
def one_thread():
    """As many as the run that nobody disturbed has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("moves", [0, 1, 3, "all"])
def test_killed_while_the_model_is_published(root, uninterrupted, one_thread, monkeypatch, moves):
    output, replace, moved = root / f"publishing-{moves}", os.replace, []
    recipe = make(root, output.name)

    def killing(source, place):
        if (
            Path(source).parent.name == checkpoints.STAGING
            and Path(place).parent == output
            and not Path(place).name.startswith("checkpoint-")
        ):
            if len(moved) == moves:
                raise Killed
            moved.append(place)
        replace(source, place)

    def write_text(path, text):
        if Path(path).name == checkpoints.RESULT:
            raise Killed
        written(path, text)

    written = checkpoints.write_text
    with monkeypatch.context() as patch:
        patch.setattr("train.run.os.replace", killing)
        if moves == "all":
            patch.setattr(checkpoints, "write_text", write_text)
        with pytest.raises(Killed):
            run([str(recipe)])
    assert not (output / checkpoints.RESULT).exists(), "the folder is not said to hold a model before it does"
    assert len(moved) > 3 if moves == "all" else len(moved) == moves
    assert run([str(recipe)]) == 0
    assert_same_weights(output, uninterrupted)


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


# What going on costs


@pytest.fixture
def seen(monkeypatch):
    """What the runs of a test read in this process (`rows`), decoded (`decoded`) and trained on (`trained`), in order."""
    found = {"rows": [], "decoded": [], "trained": []}
    read, decode, step = PairDataset.__getitem__, Media.decode, ContrastiveTrainer.training_step

    def counted_read(self, key):
        found["rows"].append(key)
        return read(self, key)

    def counted_decode(self, features):
        found["decoded"] += features.pending
        return decode(self, features)

    def counted_step(self, model, inputs, *rest):
        found["trained"].append([tuple(row) for row in inputs["rows"]])
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(PairDataset, "__getitem__", counted_read)
    monkeypatch.setattr(Media, "decode", counted_decode)
    monkeypatch.setattr(ContrastiveTrainer, "training_step", counted_step)
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # four workers on two cores
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_going_on_reads_and_decodes_nothing_of_the_steps_before(tmp_path, seen, workers):
    output = tmp_path / "output"
    recipe = write_recipe(tmp_path, output=str(output), steps=6, save_steps=4, retain="all", seed=3)
    assert run([str(recipe)]) == 0
    made = load_recipe(recipe)
    weights = [source.weight for source in made.data.sources]
    sampler = BlockSampler([24, 24], weights, global_batch=8, block=4, steps=6, seed=3)
    assert seen["trained"] == [sampler.batch(step) for step in range(6)]
    before = load_file(output / "model.safetensors")
    shutil.rmtree(output / "checkpoint-6")
    (output / "train_result.json").unlink()
    for found in seen.values():
        found.clear()
    assert run([str(recipe), "--workers", str(workers)]) == 0
    rest = [sampler.batch(step) for step in (4, 5)]
    assert seen["trained"] == rest
    # Workers read in processes of their own.
    assert seen["rows"] == ([] if workers else sum(rest, []))
    pictures = [str(tmp_path / "images" / f"{row}.jpg") for step in rest for source, row in step if source == 0]
    assert pictures and sorted(str(frame) for (frame,) in seen["decoded"]) == sorted(pictures), "each once"
    after = load_file(output / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
