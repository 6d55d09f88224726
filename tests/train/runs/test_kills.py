"""Runs that are killed five times, anywhere, end in the weights of one that was not, to the bit; no checkpoint is ever half there."""

import json
import os
import random
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.processes import ended, join, start
from tests.helpers.tiny_recipe import write_recipe

STEPS = 60  # more than five kills let pass on a fast machine
KILLS, EARLY = 5, (0, 2)  # early ones besides


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    write_recipe(folder)
    # Dropout: a run whose generators, each rank's own, are not where they were goes another way.
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["attention_dropout"] = 0.2
    path.write_text(json.dumps(config))
    return folder


def train_main(rank, port, recipe, ranks):
    if ranks > 1:
        join(rank, port, ranks)
    torch.set_num_threads(1)
    from train.run import run

    os._exit(run([str(recipe)]))


def assert_whole(folder, ranks):
    """Everything that bears the name of a checkpoint can be read."""
    load_file(folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(folder / name, weights_only=True)
    generators = [f"rng_state_{rank}.pth" for rank in range(ranks)] if ranks > 1 else ["rng_state.pth"]
    for name in ("trainer_state.json", "vlm2vec.json", "tokenizer.json", *generators):
        assert (folder / name).stat().st_size > 0, folder / name


def step(checkpoint):
    return int(checkpoint.name.rpartition("-")[2])


@pytest.mark.slow
@pytest.mark.timeout(900)  # seven starts: minutes on a machine that is shared with much else
@pytest.mark.parametrize("ranks", [1, 2], ids=["one process", "two ranks under DDP"])
def test_killed_five_times_a_run_ends_in_the_same_weights(root, ranks):
    changes = {"steps": STEPS, "save_steps": 1, "keep_checkpoints": 2, "lr_schedule": "cosine"}
    whole = write_recipe(root, output=str(root / f"unbroken-{ranks}"), **changes)
    assert ended(start(train_main, whole, ranks, ranks=ranks)) == [0] * ranks
    output = root / f"killed-{ranks}"
    recipe = write_recipe(root, output=str(output), **changes)
    moments = random.Random(ranks)
    reached = []
    for kill in range(KILLS):
        if kill in EARLY:  # on its way to the first step: libraries, model, checkpoint
            processes = start(train_main, recipe, ranks, ranks=ranks)
            time.sleep(moments.random() * 4)
            for process in processes:
                process.kill()
            ended(processes)
            for checkpoint in output.glob("checkpoint-*"):
                assert_whole(checkpoint, ranks)
        processes = start(train_main, recipe, ranks, ranks=ranks)
        target = reached[-1] + 1 if reached else 1
        deadline = time.monotonic() + 250  # a busy machine starts processes slowly
        while time.monotonic() < deadline and not any(step(c) >= target for c in output.glob("checkpoint-*")):
            assert all(process.is_alive() for process in processes), f"exit codes {[p.exitcode for p in processes]} before the kill"
            time.sleep(0.005)
        time.sleep(moments.random() * 0.3)  # anywhere in a step, in saving or in removing
        for process in processes if kill % 2 else processes[::-1]:
            process.kill()
        ended(processes)
        for checkpoint in output.glob("checkpoint-*"):
            assert_whole(checkpoint, ranks)
        reached.append(max(step(c) for c in output.glob("checkpoint-*")))
    assert reached[-1] < STEPS and reached == sorted(set(reached)), "each run went on from the one before and was cut short"
    assert ended(start(train_main, recipe, ranks, ranks=ranks)) == [0] * ranks
    expected, got = (load_file(folder / "model.safetensors") for folder in (root / f"unbroken-{ranks}", output))
    before = load_file(root / "model" / "model.safetensors")
    assert expected.keys() == got.keys() and any(not torch.equal(expected[name], before[name]) for name in before)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    assert not list(output.glob(".saving*"))
