"""The folder that a run writes into: nothing of the user's is removed, nothing stale or damaged is taken for good."""

import json
import shutil

import pytest

from tests.helpers.tiny_recipe import write_recipe
from train.checkpoints import complete_checkpoints
from train.run import run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("outputs")
    recipe = write_recipe(root, save_steps=2)
    assert run([str(recipe)]) == 0
    return root


def test_fresh_removes_what_the_run_wrote_and_nothing_else(place, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(place / "output", output)
    recipe = write_recipe(place, output=str(output), save_steps=2)
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a model folder"):
        run([str(recipe), "--model", str(output.parent), "--fresh"])
    assert (output / "model.safetensors").is_file() and len(complete_checkpoints(output)) == 2, "a mistake costs no earlier model"
    assert run([str(recipe), "--fresh", "--steps", "1"]) == 0
    assert (output / "thesis.txt").read_text() == "mine"
    assert [folder.name for folder in complete_checkpoints(output)] == ["checkpoint-1"]


def test_fresh_does_not_touch_a_folder_of_something_else(place, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "recipe.yaml").write_text("my: cake")
    with pytest.raises(ValueError, match="is not empty and holds no earlier run"):
        run([str(write_recipe(place, output=str(tmp_path / "docs"))), "--fresh"])
    assert (tmp_path / "docs" / "recipe.yaml").read_text() == "my: cake"


@pytest.mark.parametrize("finished", [True, False])
def test_another_base_model_under_the_same_name_is_noticed(place, tmp_path, finished):
    model, output = tmp_path / "model", tmp_path / "output"
    shutil.copytree(place / "model", model)
    recipe = write_recipe(place, output=str(output), model=str(model), save_steps=2)
    assert run([str(recipe)]) == 0
    if not finished:
        (output / "train_result.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"made": "again"}))
    with pytest.raises(ValueError, match="other contents of model; choose another output, or pass --fresh"):
        run([str(recipe)])


def test_seconds_of_earlier_sessions_count(place, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(place / "output", output)
    (output / "train_result.json").unlink()
    shutil.rmtree(output / "checkpoint-4")
    state = output / "checkpoint-2" / "trainer_state.json"
    logged = json.loads(state.read_text())
    logged["log_history"][-1]["seconds"] = 1000.0
    state.write_text(json.dumps(logged))
    (output / "checkpoint-2" / "checksums.json").unlink()
    assert run([str(write_recipe(place, output=str(output), save_steps=2))]) == 0
    assert 1000 < json.loads((output / "train_result.json").read_text())["seconds"] < 1100


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors"])
def test_a_cut_checkpoint_is_named_with_the_mend(place, tmp_path, name):
    output = tmp_path / "output"
    shutil.copytree(place / "output", output)
    (output / "train_result.json").unlink()
    file = output / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    recipe = write_recipe(place, output=str(output), save_steps=2)
    with pytest.raises(ValueError, match=rf"checkpoint-4/{name} is damaged.*remove the folder .*checkpoint-4 to go on from the one before"):
        run([str(recipe)])
    shutil.rmtree(output / "checkpoint-4")
    assert run([str(recipe)]) == 0


@pytest.mark.parametrize("name, text", [("train_result.json", "{"), ("train_result.json", "[]"), ("recipe.yaml", "a: [")])
def test_a_damaged_record_is_named(place, tmp_path, name, text):
    output = tmp_path / "output"
    shutil.copytree(place / "output", output)
    if name == "recipe.yaml":
        (output / "train_result.json").unlink()
    (output / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} is damaged.*--fresh"):
        run([str(write_recipe(place, output=str(output), save_steps=2))])


def test_a_wrong_folder_of_images_stops_the_run(place, tmp_path):
    with pytest.raises(ValueError, match=r"rows cannot be read.*data\.root and data\.images"):
        run([str(write_recipe(place, output=str(tmp_path / "output"))), "--data.images", str(tmp_path)])
    assert not complete_checkpoints(tmp_path / "output")
