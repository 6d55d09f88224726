"""Figures of a run in TensorBoard and W&B, written by the library; what is not there is named before a model is loaded."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.helpers.repository import ROOT
from tests.helpers.tiny_recipe import write_recipe
from train.recipe import checks as recipe_checks
from train.recipe.schema import load_recipe
from train.run import run
from vlm2vec.model import VLM2Vec

FIGURES = (
    "loss",
    "accuracy",
    "positive_similarity",
    "hardest_negative_similarity",
    "temperature",
    "grad_norm",
    "learning_rate",
    "samples_per_second",
    "tokens_per_second",
    "padding_avoided",
    "peak_memory_mib",
    "data_ms",
    "first_pass_ms",
    "loss_ms",
    "second_pass_ms",
    "sync_ms",
    "optimizer_ms",
    "other_ms",
    "step_ms",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    write_recipe(folder)
    return folder


def test_a_report_that_is_not_installed_is_refused_before_loading(root, tmp_path, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("the model was loaded")

    find_spec = importlib.util.find_spec
    gone = {"tensorboard", "tensorboardX", "wandb"}
    monkeypatch.setattr(VLM2Vec, "from_pretrained", loaded)
    monkeypatch.setattr(recipe_checks.importlib.util, "find_spec", lambda name, *more: None if name in gone else find_spec(name, *more))
    recipe = write_recipe(root, output=str(tmp_path / "output"))
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ValueError, match=f"report_to: {name} is not installed; pip install {name}, or pass --report_to none"):
            run([str(recipe), "--report_to", name])
    gone.remove("tensorboardX")
    monkeypatch.setattr(recipe_checks.importlib.util, "find_spec", lambda name, *more: None if name in gone else "there")
    assert load_recipe(recipe, ["--report_to", "tensorboard"]).report_to == ["tensorboard"], "tensorboardX writes the same files"
    assert load_recipe(recipe, ["--report_to", "none"]).report_to == []


def test_every_place_to_report_to_that_this_knows_is_one_of_the_librarys():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert recipe_checks._REPORTER_MODULES.keys() <= INTEGRATION_TO_CALLBACK.keys()


def test_tensorboard_gets_every_figure_of_every_log_line(root, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "output"
    assert run([str(write_recipe(root, output=str(output), report_to=["tensorboard"]))]) == 0
    (events,) = (output / "runs").glob("*/events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    logged = [entry for entry in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4]
    for name in FIGURES:
        points = read.Scalars(f"train/{name}")
        assert [p.step for p in points] == [1, 2, 3, 4]
        assert [p.value for p in points] == pytest.approx([entry[name] for entry in logged], rel=1e-6), name


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed; pip install wandb")
def test_wandb_gets_every_figure_offline(root, tmp_path):
    recipe = write_recipe(root, output=str(tmp_path / "output"), report_to=["wandb"], run_name="figures")
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    # A process of its own: the library's service outlives the run in this one.
    command = [sys.executable, "-m", "train", str(recipe)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    record = written.read_bytes()
    for name in FIGURES:
        assert record.count(f"train/{name}".encode()) >= 4, f"{name} at every step"
