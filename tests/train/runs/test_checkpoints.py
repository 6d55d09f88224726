"""Checkpoints are whole or absent, and only whole ones are found."""

import json
import os
import shutil

import pytest

from tests.helpers.tiny_recipe import write_recipe
from train import checkpoints
from train.run import run


def whole(folder, step, weights=("model.safetensors",)):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in (*weights, "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path / name).write_bytes(b"x" * 10)
    (path / "trainer_state.json").write_text("{}")
    return path


def names(folder):
    return [path.name for path in checkpoints.complete_checkpoints(folder)]


def test_only_complete_checkpoints_are_found_in_step_order(tmp_path):
    for step in (100, 20, 3):
        whole(tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()  # what the library alone leaves when it is killed while writing
    (tmp_path / "checkpoint-300").write_text("no folder")
    whole(tmp_path, 1).rename(tmp_path / "checkpoint-best")
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert checkpoints.complete_checkpoints(tmp_path / "absent") == []


@pytest.mark.parametrize("lacking", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_that_lacks_a_file_is_none(tmp_path, lacking):
    whole(tmp_path, 1)
    (whole(tmp_path, 2) / lacking).unlink()
    assert names(tmp_path) == ["checkpoint-1"]


def test_adapters_shards_and_ranks(tmp_path):
    whole(tmp_path, 1, ["adapter_model.safetensors"])
    (whole(tmp_path, 2) / "rng_state.pth").rename(tmp_path / "checkpoint-2" / "rng_state_0.pth")
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"weight_map": {"a": parts[0], "b": parts[1]}})
    for step, kept in ((3, parts), (4, parts[:1])):
        (whole(tmp_path, step, kept) / "model.safetensors.index.json").write_text(index)
    (whole(tmp_path, 5, parts) / "model.safetensors.index.json").write_text(index[:20])
    whole(tmp_path, 6, parts)  # without their index
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "adapter"])
def test_what_a_run_writes_is_complete_and_needs_each_of_those_files(tmp_path, lora):
    output = tmp_path / "output"
    assert run([str(write_recipe(tmp_path, output=str(output), steps=1, save_steps=1, lora=lora))]) == 0
    assert names(output) == ["checkpoint-1"]
    needed = {
        "adapter_model.safetensors" if lora else "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    for file in sorted(needed):
        moved = (output / "checkpoint-1" / file).rename(output / file)
        assert names(output) == [], file
        moved.rename(output / "checkpoint-1" / file)


def test_publish_replaces_and_rotate_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        whole(tmp_path, step)
    staged = whole(tmp_path / checkpoints.STAGING, 3)
    (staged / "new").write_text("")
    checkpoints.publish(staged, tmp_path / "checkpoint-3")
    assert (tmp_path / "checkpoint-3" / "new").is_file()
    checkpoints.rotate(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_leftovers_are_removed(tmp_path):
    whole(tmp_path / checkpoints.STAGING, 9)
    whole(tmp_path, 1).rename(tmp_path / f"{checkpoints.STAGING}-old-checkpoint-1")
    checkpoints.remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "removal", [lambda folder: checkpoints.discard(folder), lambda folder: checkpoints.rotate(folder, 1)], ids=["discard", "rotate"]
)
def test_a_removal_cut_short_leaves_no_half_checkpoint(tmp_path, monkeypatch, removal):
    for step in (1, 2, 3):
        whole(tmp_path, step)
    rmtree = shutil.rmtree

    def killed(folder, **options):
        """Removes the weights and no more."""
        if not os.path.isdir(folder):
            return rmtree(folder, **options)
        os.unlink(os.path.join(folder, "model.safetensors"))
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            removal(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert all((path / "model.safetensors").is_file() for path in tmp_path.glob("checkpoint-*"))
    removal(tmp_path)
    checkpoints.remove_unfinished(tmp_path)
    assert len(os.listdir(tmp_path)) in (0, 1) and not list(tmp_path.glob(f"{checkpoints.STAGING}*"))


def test_fresh_that_was_cut_short_begins_again(tmp_path, monkeypatch):
    """Whatever a kill in `--fresh` leaves, the same command and the one without it both train the recipe."""
    output = tmp_path / "output"
    recipe = str(write_recipe(tmp_path, output=str(output), steps=2, save_steps=1))
    assert run([recipe]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_remove", lambda folder: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run([recipe, "--fresh"])
    assert not (output / "train_result.json").is_file(), "a model of which something may be gone is not called finished"
    assert run([recipe, "--fresh"]) == 0 and (output / "train_result.json").is_file()
    assert names(output) == ["checkpoint-1", "checkpoint-2"]
