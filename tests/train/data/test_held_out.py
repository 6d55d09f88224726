"""Rows held out of training: never in a batch, scored as one by one in float64, and without a trace in what is trained."""

import contextlib
import json
import traceback

import pytest
import torch
from safetensors.torch import load_file

from contrastive_kernels.reference import info_nce_reference
from tests.helpers.processes import context, ended, join, start
from tests.helpers.tiny_recipe import write_recipe
from train.build import build_model
from train.data.held_out import evaluate
from train.data.rows import PairDataset
from train.data.sampler import BlockSampler
from train.recipe.schema import load_recipe
from train.run import run
from train.step import ContrastiveStep

CHANGES = {"held_out": {"rows": 3, "steps": 2}, "dtype": "float64", "chunk_tokens": 60}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Thirty rows a source, so that three of each are a tenth."""
    from tests.helpers import tiny_recipe as tiny

    monkeypatch.setattr(tiny, "write_data", lambda where, made=tiny.write_data: made(where, rows=30))
    return tmp_path


def prepared(root, **changes):
    return opened(write_recipe(root, **CHANGES | changes))


def opened(path):
    recipe = load_recipe(path)
    model = build_model(recipe, device="cpu").train()
    return recipe, model, PairDataset(recipe.data, model.processing, recipe.held_out_rows)


def test_they_are_the_last_rows_and_in_no_batch(root):
    recipe, _, data = prepared(root)
    assert data.sizes == [27, 27] and data.held_out_rows() == [range(27, 30), range(27, 30)]
    sampler = BlockSampler(data.sizes, [2.0, 1.0], global_batch=8, block=4, steps=60, seed=0)
    drawn = {row for step in range(60) for row in sampler.batch(step)}
    assert drawn == {(source, row) for source in range(2) for row in range(27)}


def test_no_more_than_a_tenth(root):
    recipe, model, _ = prepared(root)
    assert PairDataset(recipe.data, model.processing, 1000).sizes == [27, 27]
    assert PairDataset(recipe.data, model.processing).sizes == [30, 30]


@pytest.mark.parametrize("changes", [{}, {"chunk_rows": 2}, {"freeze_vision": True}])
def test_scores_are_those_of_rows_one_by_one(root, changes):
    recipe, model, data = prepared(root, **changes)
    truth = {}
    for source, rows in enumerate(data.held_out_rows()):
        sides = []
        for side in ("query", "target"):
            samples = [model.processing(item) for item in (data.tables[source].row(row, data.frames)[side == "target"] for row in rows)]
            with torch.no_grad():
                sides.append(torch.nn.functional.normalize(torch.cat([model.eval()(model.pack([sample])) for sample in samples]), dim=1))
        loss, stats = info_nce_reference(*sides, temperature=recipe.loss.temperature, return_stats=True)
        truth[recipe.data.sources[source].name] = (float(loss), float(stats.accuracy))
    got = evaluate(ContrastiveStep(recipe, model.train(), model, device=torch.device("cpu")), data, recipe)
    assert got["eval_loss"] == pytest.approx(sum(loss for loss, _ in truth.values()) / 2, rel=2e-5)  # vectors are compared in float32
    for name, (_, accuracy) in truth.items():
        assert got[f"eval_{name}_accuracy"] == pytest.approx(accuracy)
    assert got["eval_accuracy"] == pytest.approx(sum(a for _, a in truth.values()) / 2)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_damaged_picture_costs_its_row(root):
    recipe, model, data = prepared(root)
    (root / "images" / "28.jpg").write_bytes((root / "images" / "28.jpg").read_bytes()[:200])
    got = evaluate(ContrastiveStep(recipe, model, model, device=torch.device("cpu")), data, recipe)
    assert torch.isfinite(torch.tensor(list(got.values()))).all()


def test_training_is_the_same_with_and_without_scoring(root):
    """Dropout draws from the generators that scoring must leave alone."""
    common = CHANGES | {"lora": {"r": 2, "alpha": 4, "dropout": 0.3, "dora": False}}
    weights = []
    for name, steps in (("often", 1), ("never", 50)):
        output = root / name
        assert run([str(write_recipe(root, **common | {"output": str(output), "held_out": {"rows": 3, "steps": steps}}))]) == 0
        weights.append(load_file(next(output.glob("adapter_model.safetensors"))))
        log = json.loads((output / "trainer_state.json").read_text())["log_history"]
        scored = [entry["step"] for entry in log if "eval_loss" in entry]
        assert scored == ([1, 2, 3, 4] if steps == 1 else [4])  # the last step is always scored
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    result = json.loads((root / "often" / "train_result.json").read_text())
    assert {"eval_loss", "eval_accuracy", "eval_Pictures_accuracy", "eval_Texts_accuracy"} <= result.keys()
    assert "held-out rows: accuracy" in (root / "often" / "README.md").read_text()


@pytest.mark.parametrize("wrong", [{"rows": 0, "steps": 2}, {"rows": 3, "steps": 0}])
def test_numbers_below_one_are_refused(root, wrong):
    with pytest.raises(ValueError, match="held_out.rows and held_out.steps must be at least 1.*leave the section out"):
        load_recipe(write_recipe(root, held_out=wrong))


def rank_main(rank, port, root, queue):
    try:
        join(rank, port)
        import accelerate

        from train.parallel import sharding

        accelerate.PartialState(cpu=True)
        for wrapper in ("ddp", "fsdp"):
            recipe, model, data = opened(root / "output.yaml")
            wrapped = torch.nn.parallel.DistributedDataParallel(model) if wrapper == "ddp" else sharding.shard(model)
            step = ContrastiveStep(recipe, wrapped, model, device=torch.device("cpu"), world_size=2)
            queue.put((wrapper, evaluate(step, data, recipe, rank, 2)))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        queue.put(("failed", traceback.format_exc()))
        raise


def test_two_ranks_share_the_chunks_and_agree(root):
    recipe, model, data = prepared(root)
    alone = evaluate(ContrastiveStep(recipe, model, model, device=torch.device("cpu")), data, recipe)
    queue = context().Queue()
    processes = start(rank_main, root, queue)
    with contextlib.ExitStack() as stack:
        stack.callback(ended, processes)
        for _ in range(4):
            name, got = queue.get(timeout=200)
            assert name != "failed", got
            assert got.keys() == alone.keys()
            assert all(got[k] == pytest.approx(alone[k], rel=1e-5) for k in alone), name
