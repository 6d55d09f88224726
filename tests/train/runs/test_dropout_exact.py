"""A Qwen2-VL with dropout, pictures of several sizes, float64: however the graphs are made, the gradients of the same chunks."""

import json

import pytest
import torch

from tests.helpers.tiny_recipe import first_batch, gradients, write_recipe
from train.build import build_model
from train.recipe.schema import load_recipe
from train.step import ContrastiveStep


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dropout")
    write_recipe(folder)
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["attention_dropout"] = 0.3
    path.write_text(json.dumps(config))
    return folder


def step_gradients(root, seed=5, **changes):
    recipe = load_recipe(write_recipe(root, **({"dtype": "float64", "seed": 3, "chunk_tokens": 120} | changes)))
    model = build_model(recipe).train()
    batch = first_batch(recipe, model)
    sizes = {tuple(map(int, sample["vision"]["grid_thw"].flatten())) for sample in batch["query"] if sample["pending"]}
    assert len(sizes) >= 3, "pictures of several sizes"
    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))
    torch.manual_seed(seed)
    step(batch)
    return gradients(model)


@pytest.fixture(scope="module")
def kept(root):
    """One backward through the graphs of all chunks."""
    return step_gradients(root, retain="all")


@pytest.mark.parametrize("changes", [{"retain": 0}, {"retain": 2}, {"retain": 0, "gradient_checkpointing": True}], ids=str)
def test_gradients_with_dropout_are_those_of_kept_graphs(root, kept, changes):
    got = step_gradients(root, **changes)
    assert got.keys() == kept.keys() and got
    for name, gradient in kept.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_dropout_is_on(root, kept):
    other = step_gradients(root, seed=6, retain=0)
    assert (
        max(((other[name] - gradient).norm() / gradient.norm()).item() for name, gradient in kept.items() if gradient.norm() > 1e-8) > 0.01
    )
