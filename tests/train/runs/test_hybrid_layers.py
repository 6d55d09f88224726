"""A model whose layers carry a state (Qwen3.5) in training: streamed chunks, adapters, a whole run, and its plan."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.measured_peak import measured
from tests.helpers.streaming import equals_images_decoded_at_once
from tests.helpers.tiny_recipe import first_batch, write_recipe
from train.build import build_model
from train.plan import batch as plan_batch
from train.plan.simulate import simulate
from train.recipe.schema import load_recipe
from train.run import run
from vlm2vec import VLM2Vec

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LORA = {"r": 2, "dropout": 0.0, "targets": ["all-linear"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_5")
    write_recipe(folder, "qwen3_5")
    return folder


@pytest.mark.parametrize(
    "changes", [{"retain": 1}, {"freeze_vision": True}, {"gradient_checkpointing": True}, {"chunk_rows": 3, "lora": LORA}], ids=str
)
def test_gradients_of_chunks_are_those_of_one_batch(root, changes):
    recipe = load_recipe(write_recipe(root, **{"dtype": "float64", "retain": 0, "seed": 3, "chunk_tokens": 120} | changes))
    model = build_model(recipe).train()
    equals_images_decoded_at_once(recipe, model, first_batch(recipe, model))


def test_an_adapter_of_every_linear_layer_trains_and_loads_again(root):
    output = root / "lora"
    assert run([str(write_recipe(root, output=str(output), lora=LORA))]) == 0
    tensors = load_file(output / "adapter_model.safetensors")
    for layer in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"):
        learned = [value for name, value in tensors.items() if f"linear_attn.{layer}.lora_B" in name]
        assert len(learned) == 3 and all(value.abs().max() > 0 for value in learned), layer
    rows = VLM2Vec.from_pretrained(output, device="cpu").encode(["a fox", "two hens in a yard"])
    plain = VLM2Vec.from_pretrained(root / "model", device="cpu").encode(["a fox", "two hens in a yard"])
    assert torch.from_numpy(rows - plain).abs().max() > 1e-3


def test_the_planned_peak_is_the_measured_one(root):
    recipe = load_recipe(write_recipe(root, output=str(root / "o"), retain=0, chunk_tokens=2000))
    plan = simulate(
        recipe, None, make_batch=lambda processing: plan_batch.first_batch(recipe, processing, 1), flash=False, most_chunks=1000
    )
    assert 1.0 <= plan.peak / measured(recipe) <= 1.02
