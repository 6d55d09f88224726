"""LoRA, DoRA and QLoRA runs: what trains, what is written, what loads again, and how a run goes on."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tiny_recipe import write_recipe
from train.build import build_model, trained_parameters, vision_is_frozen
from train.recipe.schema import load_recipe
from train.run import run
from vlm2vec import VLM2Vec

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    write_recipe(folder)
    return folder


def embeddings(folder, **options):
    model = VLM2Vec.from_pretrained(str(folder), device="cpu", **options)
    return torch.from_numpy(model.encode(["a fox", "two hens in a yard"]))


@pytest.mark.parametrize("kind", ["lora", "dora", "nf4"])
def test_an_adapter_trains_is_saved_alone_and_loads_again(root, kind):
    lora = {"r": 4, "alpha": 8, "dropout": 0.0, "dora": kind == "dora", "vision": False}
    quantization = "nf4" if kind == "nf4" else None
    output = root / kind
    recipe = write_recipe(
        root, output=str(output), lora=lora, quantization=quantization, optimizer="adamw_8bit" if kind == "nf4" else "adamw_torch"
    )
    assert run([str(recipe)]) == 0
    assert (output / "adapter_model.safetensors").is_file() and not list(output.glob("model*.safetensors"))
    tensors = load_file(output / "adapter_model.safetensors")
    assert tensors and not any("visual" in name for name in tensors)
    assert all(value.abs().max() > 0 for name, value in tensors.items() if "lora_B" in name), "B starts at zero: every layer has learned"
    assert any("magnitude" in name for name in tensors) == (kind == "dora")
    loaded = embeddings(output, **({"quantize": "nf4"} if quantization else {}))
    assert (loaded - embeddings(root / "model")).abs().max() > 1e-3


def test_an_adapter_run_goes_on_from_its_checkpoint_with_equal_weights(root):
    lora = {"r": 4, "alpha": 8, "dropout": 0.2, "dora": True}
    whole = write_recipe(root, output=str(root / "whole"), lora=lora, save_steps=2)
    assert run([str(whole)]) == 0
    # The state after a kill: the checkpoint of step 2 and the recipe, nothing else.
    cut = root / "cut"
    cut.mkdir()
    (root / "whole" / "checkpoint-2").rename(cut / "checkpoint-2")
    (cut / "recipe.yaml").write_text((root / "whole" / "recipe.yaml").read_text())
    assert run([str(write_recipe(root, output=str(cut), lora=lora, save_steps=2))]) == 0
    expected, got = (load_file(f / "adapter_model.safetensors") for f in (root / "whole", cut))
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


@pytest.mark.parametrize("vision", [None, False, True])
def test_which_layers_are_adapted(root, vision):
    recipe = load_recipe(write_recipe(root, output=str(root / "layers"), lora={"r": 2, "vision": vision}))
    model = build_model(recipe)
    adapted = {name.partition(".lora_")[0] for name, p in model.model.named_parameters() if p.requires_grad}
    tower = {name for name in adapted if name.startswith("visual.")}
    assert {name.rpartition(".")[2] for name in adapted - tower} == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in tower} == ({"qkv", "proj", "fc1", "fc2", "0", "2"} if vision else set())
    assert vision_is_frozen(model) == (not vision)
    trained, total = trained_parameters(model)
    assert 0 < trained < total / 5


def test_a_vision_adapter_survives_saving(root, tmp_path):
    model = build_model(load_recipe(write_recipe(root, output=str(root / "layers"), lora={"r": 2, "vision": True})))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "saved")
    image = {"text": "<|image_1|>\nwhat", "image": root / "images" / "1.jpg"}
    again = VLM2Vec.from_pretrained(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(torch.from_numpy(again.encode([image])), torch.from_numpy(model.encode([image])))


def test_a_published_adapter_is_trained_further_or_refused(root, tmp_path):
    model = build_model(load_recipe(write_recipe(root, output=str(root / "layers"), lora={"r": 2, "dora": False})))
    model.save_pretrained(tmp_path / "published")
    assert json.loads((tmp_path / "published" / "adapter_config.json").read_text())["r"] == 2
    changes = {"model": str(tmp_path / "published"), "output": str(root / "further")}
    further = build_model(load_recipe(write_recipe(root, **changes, lora={"r": 2, "dora": False})))
    assert sum(p.requires_grad for p in further.parameters()) == sum(".lora_" in n for n, _ in further.named_parameters())
    with pytest.raises(ValueError, match="has r 2"):
        build_model(load_recipe(write_recipe(root, **changes, lora={"r": 4, "dora": False})))
    with pytest.raises(ValueError, match="is an adapter and the recipe has no `lora:`"):
        build_model(load_recipe(write_recipe(root, **changes)))
