"""The recipes that fine-tune Qwen3-VL-Embedding, on a tiny model of its family: trained, killed, resumed, merged, reloaded."""

import json

import pytest
import torch
from PIL import Image

from tests.helpers.repository import ROOT
from tests.helpers.tiny_models import qwen3_vl
from tests.helpers.tiny_recipe import write_data
from train.recipe.schema import load_recipe
from train.run import run
from train.trainer import ContrastiveTrainer
from vlm2vec.model import VLM2Vec

RECIPES = sorted((ROOT / "train" / "recipes").glob("qwen3-vl-embedding-*.yaml"))
INPUTS = ["a fox", {"image": Image.new("RGB", (70, 60), (200, 40, 90))}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedding_recipes")
    (folder / "qwen3-vl-embedding-tiny").mkdir()
    qwen3_vl(folder / "qwen3-vl-embedding-tiny")
    write_data(folder)
    return folder


def overrides(root, output):
    """Other places, and numbers that make a step small; what is trained, and by which loss, is the recipe's."""
    said = {
        "model": root / "qwen3-vl-embedding-tiny",
        "output": output,
        "data.root": root / "train",
        "data.images": root / "images",
        "data.mixture": "null",
        "data.sources": "[{name: Pictures}, {name: Texts}]",
        "loss.matryoshka.dims": "[16, 8]",
        "cpu": "true",
        "dtype": "float32",
        "steps": 4,
        "warmup_steps": 0,
        "global_batch": 8,
        "chunk_tokens": 600,
        "save_steps": 2,
        "learning_rate": 1e-3,
        "workers": 0,
        "report_to": "none",
    }
    return [word for key, value in said.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_runs_through(root, tmp_path, monkeypatch, path):
    words = overrides(root, tmp_path / "out")
    recipe = load_recipe(path, words)
    published = load_recipe(path)
    assert (recipe.lora, recipe.autocast, recipe.loss.mask_margin) == (published.lora, published.autocast, 0.1)
    training_step = ContrastiveTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise RuntimeError("killed")
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveTrainer, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run([str(path), *words])
    assert run([str(path), *words]) == 0
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in log if "loss" in line][0] == 1
    trained = VLM2Vec.from_pretrained(tmp_path / "out", device="cpu")
    vectors = trained.encode(INPUTS, convert_to_tensor=True)
    assert trained.options["chat_template"] and trained.options["max_pixels"] == 1310720
    base = VLM2Vec.from_pretrained(root / "qwen3-vl-embedding-tiny", device="cpu", max_pixels=1310720)
    assert float((base.encode(INPUTS, convert_to_tensor=True) - vectors).abs().max()) > 1e-4, "it trained"
    trained.save_pretrained(tmp_path / "merged", merge=True)
    again = VLM2Vec.from_pretrained(tmp_path / "merged", device="cpu").encode(INPUTS, convert_to_tensor=True)
    torch.testing.assert_close(again, vectors, rtol=1e-4, atol=1e-5)
