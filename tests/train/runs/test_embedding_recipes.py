"""The recipes of published embedders and of Qwen3.5, on tiny models of their families: trained, killed, resumed, merged, reloaded."""

import json

import pytest
import torch
from PIL import Image

from tests.helpers.repository import ROOT
from tests.helpers.tiny_embedders import qwen3_vl_embedding, wemm
from tests.helpers.tiny_models import qwen3_5
from tests.helpers.tiny_recipe import write_data
from train.recipe.schema import load_recipe
from train.run import run
from train.trainer import ContrastiveTrainer
from vlm2vec.model import VLM2Vec

MODELS = {"qwen3-vl-embedding-": qwen3_vl_embedding, "wemm-embedding-": wemm, "qwen3.5-": qwen3_5}
RECIPES = sorted(path for name in MODELS for path in (ROOT / "train" / "recipes").glob(f"{name}*.yaml"))
INPUTS = ["a fox", {"image": Image.new("RGB", (70, 60), (200, 40, 90))}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedding_recipes")
    for name, make in MODELS.items():
        (folder / f"{name}tiny").mkdir()
        make(folder / f"{name}tiny")
    write_data(folder)
    return folder


def overrides(model, root, output):
    """Other places, and numbers that make a step small; what is trained, and by which loss, is the recipe's."""
    said = {
        "model": model,
        "output": output,
        "data.root": root / "train",
        "data.images": root / "images",
        "data.mixture": "null",
        "data.sources": "[{name: Pictures}, {name: Texts}]",
        "loss.matryoshka.dims": "[16, 8]",
        "cpu": "true",
        "dtype": "float32",
        "steps": 2,
        "warmup_steps": 0,
        "global_batch": 4,
        "chunk_tokens": 1200,
        "save_steps": 1,
        "learning_rate": 1e-3,
        "workers": 0,
        "report_to": "none",
    }
    return [word for key, value in said.items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_runs_through(root, tmp_path, monkeypatch, path):
    tiny = next(root / f"{name}tiny" for name in MODELS if path.name.startswith(name))
    words = overrides(tiny, root, tmp_path / "out")
    recipe = load_recipe(path, words)
    published = load_recipe(path)
    assert (recipe.lora, recipe.autocast, recipe.loss.mask_margin) == (published.lora, published.autocast, 0.1)
    training_step = ContrastiveTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 1:
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
    base = VLM2Vec.from_pretrained(tiny, device="cpu", max_pixels=1310720)
    assert trained.options == base.options, "fed as the published model is, but for the limit of its pictures"
    assert float((base.encode(INPUTS, convert_to_tensor=True) - vectors).abs().max()) > 1e-4, "it trained"
    trained.save_pretrained(tmp_path / "merged", merge=True)
    again = VLM2Vec.from_pretrained(tmp_path / "merged", device="cpu").encode(INPUTS, convert_to_tensor=True)
    torch.testing.assert_close(again, vectors, rtol=1e-4, atol=1e-5)
