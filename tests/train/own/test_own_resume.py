"""A run over own data that is killed ends in the weights of one that was not, to the bit; changed rows are noticed.

That ranks of such a run stay together is held in tests/train/runs, of rows in any table.
"""

import json
import os
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.helpers.own_data import rows, source, write_pictures
from tests.helpers.processes import ended, start
from tests.helpers.tiny_models import BUILDERS
from train import checkpoints

STEPS = 6


def write(root, output, **changes):
    path = root / f"{output}.yaml"
    sources = json.loads((root / "sources.json").read_text())
    recipe = {"model": str(root / "model"), "output": str(root / output), "data": {"sources": sources, "hard_negatives": True}}
    recipe |= {"steps": STEPS, "save_steps": 1, "global_batch": 8, "interleave_batch_size": 4, "chunk_tokens": 300, "workers": 0}
    recipe |= {"learning_rate": 1e-3, "logging_steps": 1, "cpu": True, "held_out": {"rows": 2, "steps": 3}}
    path.write_text(yaml.safe_dump(recipe | changes))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own-resume")
    (folder / "model").mkdir()
    BUILDERS["qwen2_vl"](folder / "model")
    write_pictures(folder / "pictures")
    sources = [source(form, folder / form, folder / "pictures", rows()) | {"name": form} for form in ("JSONL", "WebDataset")]
    for one in sources:
        del one["scores"], one["grade"]
    (folder / "sources.json").write_text(json.dumps(sources))
    return folder


def train_main(rank, port, recipe):
    os._exit(train_here(recipe))


def train_here(recipe):
    """With one thread, so that equal runs give equal bits."""
    from train.run import run

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run([str(recipe)])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_killed_it_ends_in_the_same_weights(root):
    assert train_here(write(root, "whole", save_steps=STEPS)) == 0
    recipe = write(root, "killed")
    processes = start(train_main, recipe, ranks=1)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not checkpoints.complete_checkpoints(root / "killed"):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.005)
    for process in processes:
        process.kill()
    ended(processes)
    reached = checkpoints.complete_checkpoints(root / "killed")
    assert reached and checkpoints.step_of(reached[-1]) < STEPS
    assert train_here(recipe) == 0
    expected, got = (load_file(root / name / "model.safetensors") for name in ("whole", "killed"))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    before = load_file(root / "model" / "model.safetensors")
    assert any(not torch.equal(expected[name], before[name]) for name in before)


def test_changed_rows_are_noticed_before_a_run_goes_on(root, tmp_path):
    recipe = write(root, "changed", steps=1)
    assert train_here(recipe) == 0
    path = root / "JSONL" / "captions.jsonl"
    held = path.read_text(encoding="utf-8")
    try:
        path.write_text(held.replace("a red shoe", "a green shoe"), encoding="utf-8")
        with pytest.raises(ValueError, match="other contents of data.JSONL"):
            train_here(recipe)
    finally:
        path.write_text(held, encoding="utf-8")
