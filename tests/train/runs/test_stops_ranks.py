"""Two gloo ranks that have to stop, or not to, together: numbers that are not finite on one of them, rows that one cannot read.

All cases share one pair of processes: starting them costs more than the cases do.
"""

import json
import shutil
import traceback

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.helpers.processes import collected, join
from tests.helpers.tiny_recipe import first_batch, write_recipe
from train.build import build_model
from train.data.sampler import BlockSampler
from train.recipe.schema import load_recipe

LORA = {"r": 2, "dropout": 0.3, "dora": False, "vision": True}  # random masks: every rank's generators are part of the state
# name: (changes of the recipe, step and rank whose first embedding, or its gradient, is not a number)
CASES = {
    "loss, ddp, first step": ({"lora": LORA}, 1, 1, False),
    "gradient, ddp": ({"lora": LORA}, 2, 0, True),
    "loss, fsdp": ({"distributed": "fsdp"}, 2, 1, False),
    "gradient, fsdp, unclipped": ({"distributed": "fsdp", "max_grad_norm": 0.0}, 2, 0, True),
}


def spoiled(at_step, gradient):
    """Replaces the model's forward until the function that comes back is called."""
    from train.step import ContrastiveStep
    from vlm2vec.model import VLM2Vec

    forward, step, count = VLM2Vec.forward, ContrastiveStep.__call__, {"step": 0}

    def counted(self, batch):
        count["step"] += 1
        return step(self, batch)

    def wrong(self, packed, vision_features=None):
        hidden = forward(self, packed, vision_features)
        if count["step"] < at_step:
            return hidden
        factor = torch.ones(len(hidden), 1)
        factor[0] = float("nan")
        if not gradient:
            return hidden * factor
        if hidden.requires_grad:
            hidden.register_hook(lambda g: g * factor)
        return hidden

    def undo():
        VLM2Vec.forward, ContrastiveStep.__call__ = forward, step

    VLM2Vec.forward, ContrastiveStep.__call__ = wrong, counted
    return undo


def stopped(rank, recipe, at_step, which, gradient):
    """The message of a run that `which` rank spoils, and whether it can go on from where it stopped."""
    from train.run import run

    undo = spoiled(at_step, gradient) if rank == which else lambda: None
    try:
        run([str(recipe)])
        return "it did not stop", None
    except FloatingPointError as error:
        message = str(error)
    finally:
        undo()
    torch.distributed.barrier()
    return message, run([str(recipe)])


def lose_rows(rank):
    """Steps until both ranks give up a run of eight rows a step of which rank 0 can read none of its four, and then a fifth."""
    from train.data.unreadable_rows import UnreadableRows

    unreadable = UnreadableRows()
    for step in range(20):
        errors = [f"row {step}"] * 4 if rank == 0 else (["other"] if step == 7 else [])
        try:
            unreadable.add(errors, 8, device=torch.device("cpu"), world_size=2)
        except ValueError as error:
            return step + 1, str(error)
    return None, None


def rank_main(rank, port, root, queue):
    try:
        join(rank, port)
        from train.run import run

        for name, (_, *case) in CASES.items():
            assert run([str(root / f"whole-{file_name(name)}.yaml")]) == 0
            queue.put((rank, name, *stopped(rank, root / f"{file_name(name)}.yaml", *case)))
        queue.put((rank, "rows", *lose_rows(rank)))
        queue.put((rank, "one row each", run([str(root / "rows.yaml")]), None))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        queue.put((rank, "failed", traceback.format_exc(), None))
        raise


def file_name(name):
    return name.replace(", ", "-").replace(" ", "-")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stops")
    for name, (changes, *_) in CASES.items():
        for prefix in ("", "whole-"):
            write_recipe(folder, output=str(folder / f"{prefix}{file_name(name)}"), save_steps=9, seed=3, **changes)
    # One row a rank and step; the first of them, on rank 0, is a picture that is not there.
    changes = {"output": str(folder / "rows"), "global_batch": 2, "interleave_batch_size": 2, "seed": 3}
    recipe = load_recipe(write_recipe(folder, **changes))
    source, row = first_batch(recipe, build_model(recipe))["rows"][0]
    assert source == 0
    shutil.copytree(folder / "images", folder / "fewer")
    (folder / "fewer" / f"{row}.jpg").unlink()
    write_recipe(folder, **changes, data=yaml.safe_load((folder / "data.yaml").read_text()) | {"images": str(folder / "fewer")})
    return folder


@pytest.fixture(scope="module")
def results(root):
    return collected(rank_main, root, each=len(CASES) + 2)


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_stop_with_the_rows_named_and_go_on_to_equal_weights(root, results, name):
    _, at_step, which, gradient = CASES[name]
    (message, code), other = (results[name, rank] for rank in range(2))
    assert (message, code) == other, "the ranks say the same"
    assert message.startswith(f"step {at_step}: the {'gradient' if gradient else 'loss'}") and f"checkpoint-{at_step - 1}" in message
    rows = batch_rows(at_step)
    sources = ["Pictures", "Texts"]
    if gradient:
        assert "all embeddings are finite" in message
        named = rows
    else:
        assert "of 8 rows have embeddings that are not finite" in message
        named = rows[4 * which : 4 * which + 4]  # the rows of the rank that was spoiled, and no other's
    listed = [word.strip(",") for word in message.replace(";", "").split() if word.partition(":")[0] in sources]
    assert listed and set(listed) <= {f"{sources[source]}:{row}" for source, row in named}
    assert code == 0
    weights = "adapter_model.safetensors" if "ddp" in name else "model.safetensors"
    whole, got = (load_file(root / f"{prefix}{file_name(name)}" / weights) for prefix in ("whole-", ""))
    assert whole.keys() == got.keys()
    for key in whole:
        assert torch.equal(whole[key], got[key]), key


def batch_rows(step):
    sampler = BlockSampler([24, 24], [2.0, 1.0], global_batch=8, block=4, steps=4, seed=3)
    return sampler.batch(step - 1)


def test_lost_rows_are_counted_over_all_ranks(results):
    """Half of the rows is not most of them; one more is, and both ranks say so at the same step with an error that one of them met."""
    for rank in range(2):
        step, message = results["rows", rank]
        assert step == 8 and message.startswith("33 of the first 64 rows cannot be read")
    assert results["rows", 0] == results["rows", 1]


def test_a_bad_image_that_is_all_of_a_ranks_first_share_costs_its_row(results):
    assert results["one row each", 0] == results["one row each", 1] == (0, None)


def test_the_norm_of_sharded_gradients_that_nothing_clips_is_the_whole_ones(root, results):
    from train.run import run

    assert run([str(write_recipe(root, output=str(root / "single"), save_steps=9, seed=3, max_grad_norm=0.0))]) == 0
    logs = [
        json.loads((root / name / "trainer_state.json").read_text())["log_history"][0]
        for name in ("single", "whole-gradient-fsdp-unclipped")
    ]
    assert logs[1]["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-4), "the first step, in float32"
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=1e-5)
