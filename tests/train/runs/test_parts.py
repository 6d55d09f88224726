"""`train:` which towers train themselves, alone or beside an adapter: gradients, checkpoints, plans, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tiny_recipe import first_batch, gradients, write_recipe
from train.build import build_model
from train.plan.batch import first_batch as planned_batch
from train.plan.simulate import simulate
from train.recipe.schema import load_recipe
from train.run import run
from train.step import ContrastiveStep
from vlm2vec.model import VLM2Vec

LORA = {"r": 2, "alpha": 4, "dropout": 0.0, "dora": False, "targets": ["q_proj", "down_proj", "fc1"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_recipe(folder)
    return folder


def part_of(name):
    return "projector" if ".merger." in name else "vision" if ".visual." in name else "language"


@pytest.mark.parametrize("parts", [["language"], ["vision"], ["projector"], ["projector", "language"], ["all"]], ids=",".join)
def test_the_named_parts_have_gradients_and_no_others(root, tmp_path, parts):
    recipe = load_recipe(write_recipe(root, output=str(tmp_path / "o"), train=parts))
    model = build_model(recipe).train()
    wanted = {"language", "vision", "projector"} if parts == ["all"] else set(parts)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (part_of(name) in wanted), name
    ContrastiveStep(recipe, model, model, device=torch.device("cpu"))(first_batch(recipe, model, 2))
    assert {part_of(name) for name in gradients(model)} == wanted


def test_one_word_and_a_list_in_one_line_are_understood(root, tmp_path):
    path = write_recipe(root, output=str(tmp_path / "o"), train="projector")
    assert load_recipe(path).train == ["projector"]
    assert load_recipe(path, ["--train", "projector,vision"]).train == ["projector", "vision"]


def test_an_adapter_goes_on_the_rest(root, tmp_path):
    recipe = load_recipe(write_recipe(root, output=str(tmp_path / "o"), train=["projector", "vision"], lora=LORA))
    model = build_model(recipe)
    adapted = {part_of(name) for name, _ in model.named_parameters() if ".lora_" in name}
    trained = {part_of(name) for name, p in model.named_parameters() if ".lora_" not in name and p.requires_grad}
    assert adapted == {"language"} and trained == {"projector", "vision"}
    language = load_recipe(write_recipe(root, output=str(tmp_path / "o"), train="language", lora=LORA))
    model = build_model(language)
    assert {part_of(name) for name, _ in model.named_parameters() if ".lora_" in name} == {"vision"}


def test_a_run_saves_what_trained_beside_its_adapter_and_goes_on(root, tmp_path):
    """Four steps, and the same four with a stop after two: the same bits; the folder reloads, merges and is PEFT's."""
    ends = []
    for name, steps in (("whole", 4), ("stopped", 2)):
        options = {"train": "projector", "lora": LORA, "save_steps": 2, "weight_decay": 0.1, "lr_schedule": "constant"}
        path = str(write_recipe(root, output=str(tmp_path / name), **options))
        assert run([path, "--steps", str(steps)]) == 0
        if steps == 2:
            assert run([path]) == 0
        ends.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    whole, stopped = ends
    merger = [name for name in whole if "merger" in name]
    assert merger and not any("lora" in name for name in merger) and any("lora_A" in name for name in whole)
    assert not any(".visual.blocks" in name and "lora" not in name for name in whole)
    base = VLM2Vec.from_pretrained(root / "model", device="cpu").model.state_dict()
    for name, tensor in whole.items():
        assert torch.equal(tensor, stopped[name]), name
        own = name.removeprefix("base_model.model.model.")
        assert name not in merger or not torch.equal(tensor, base[own]), "it trained"
    settings = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["merger"]
    model = VLM2Vec.from_pretrained(tmp_path / "whole", device="cpu")
    from PIL import Image

    picture = {"image": Image.new("RGB", (56, 56), (200, 30, 90))}
    vector = model.encode(picture, convert_to_tensor=True)
    model.save_pretrained(tmp_path / "merged", merge=True)
    torch.testing.assert_close(VLM2Vec.from_pretrained(tmp_path / "merged", device="cpu").encode(picture, convert_to_tensor=True), vector)
    plain = VLM2Vec.from_pretrained(root / "model", device="cpu").encode(picture, convert_to_tensor=True)
    assert float((plain - vector).abs().max()) > 1e-3
    assert "LoRA adapter of rank 2 beside the weights of projector" in (tmp_path / "whole" / "README.md").read_text()


@pytest.mark.parametrize("changes", [{"train": "projector"}, {"train": "projector", "lora": LORA}, {"train": ["vision"]}], ids=str)
def test_a_plan_counts_what_trains(root, tmp_path, changes):
    recipe = load_recipe(write_recipe(root, output=str(tmp_path / "o"), **changes))
    plan = simulate(recipe, None, make_batch=lambda processing: planned_batch(recipe, processing, 1))
    trained = sum(p.numel() for p in build_model(recipe).parameters() if p.requires_grad)
    assert plan.trained == trained < plan.weights
    assert plan.parts["optimizer"] == pytest.approx(8 * trained, rel=0.1)  # two moments in float32


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train": "projecter"}, "train: 'projecter' is none of language, vision, projector, all; did you mean projector"),
        ({"train": []}, "train: '' is none of"),
        ({"train": "all", "lora": LORA}, "train: all and lora contradict each other"),
        ({"train": ["language", "vision", "projector"], "lora": LORA}, "train: all and lora contradict each other"),
        ({"train": "vision", "freeze_vision": True}, "train and freeze_vision both say"),
        ({"train": "vision", "lora": LORA | {"vision": True}}, "train: vision and lora.vision contradict each other"),
        ({"train": "language", "lora": LORA, "quantization": "nf4"}, "train: language and quantization contradict each other"),
    ],
    ids=str,
)
def test_contradictions_are_refused(root, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        load_recipe(write_recipe(root, output=str(tmp_path / "o"), **changes))
