"""Which rows a step sees does not depend on loader workers or ranks."""

import pytest

from tests.helpers.tiny_recipe import write_recipe
from train.build import build_model
from train.data.rows import PairDataset
from train.recipe.schema import load_recipe
from train.trainer import ContrastiveTrainer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    recipe = load_recipe(write_recipe(tmp_path_factory.mktemp("order"), steps=6))
    return recipe, build_model(recipe)


def batches(prepared, workers, rank=0, ranks=1):
    recipe, model = prepared
    recipe.workers = workers
    trainer = ContrastiveTrainer(recipe, model, PairDataset(recipe.data, model.processing))
    return list(trainer.loader(rank, ranks))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # four workers on two cores
def test_workers_and_ranks_do_not_change_the_order(prepared):
    expected = batches(prepared, 0)
    assert len({tuple(map(tuple, batch["rows"])) for batch in expected}) == 6, "every step has rows of its own"
    for workers in (2, 4):
        for got, want in zip(batches(prepared, workers), expected, strict=True):
            assert got["rows"] == want["rows"]
            for a, b in zip(got["query"], want["query"], strict=True):
                assert (a["input_ids"] == b["input_ids"]).all() and a["pending"] == b["pending"]
    for workers in ((0, 2), (4, 0)):
        halves = [batches(prepared, workers[rank], rank, 2) for rank in range(2)]
        for left, right, want in zip(*halves, expected, strict=True):
            assert left["rows"] + right["rows"] == want["rows"]
