"""Checkpoints are whole or absent, and only whole ones are found."""

import os

from train import checkpoints


def whole(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x" * 10)
    (path / "trainer_state.json").write_text("{}")
    return path


def test_only_complete_checkpoints_are_found_in_step_order(tmp_path):
    for step in (100, 20, 3):
        whole(tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()  # what the library alone leaves when it is killed while writing
    (tmp_path / "checkpoint-best").mkdir()
    assert [p.name for p in checkpoints.complete_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert checkpoints.complete_checkpoints(tmp_path / "absent") == []


def test_publish_replaces_and_rotate_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        whole(tmp_path, step)
    staged = whole(tmp_path / checkpoints.STAGING, 3)
    (staged / "new").write_text("")
    checkpoints.publish(staged, tmp_path / "checkpoint-3")
    assert (tmp_path / "checkpoint-3" / "new").is_file()
    checkpoints.rotate(tmp_path, 2)
    assert [p.name for p in checkpoints.complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_leftovers_are_removed(tmp_path):
    whole(tmp_path / checkpoints.STAGING, 9)
    whole(tmp_path, 1).rename(tmp_path / f"{checkpoints.STAGING}-old-checkpoint-1")
    checkpoints.remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == []
