"""What is refused before a weight is read: a recipe against the machine, the model and the rows at hand."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.repository import ROOT
from tests.helpers.tiny_recipe import tiny_models, write_recipe
from train import preflight
from train.build import build_model
from train.plan import machine
from train.plan.machine import Memory
from train.recipe.schema import load_recipe
from train.run import run
from train.step import ContrastiveStep
from vlm2vec.checkpoint.pretrained import Description, describe
from vlm2vec.data.mmeb import write_train
from vlm2vec.model import VLM2Vec

GIB = 2**30
RECIPES = ROOT / "train" / "recipes"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    write_recipe(folder)
    return folder


@pytest.fixture
def unloaded(monkeypatch):
    """A run that reads a weight fails the test."""

    def loaded(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(VLM2Vec, "from_pretrained", loaded)


def refused(root, tmp_path, *words, **changes):
    with pytest.raises(ValueError) as error:
        run([str(write_recipe(root, output=str(tmp_path / "output"), **changes)), *words])
    assert not (tmp_path / "output").exists(), "nothing is written either"
    return str(error.value)


# Memory


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "bfloat16"}, {"freeze_vision": True}, {"lora": {"r": 4, "dora": True}, "dtype": "bfloat16"}], ids=str
)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_5", "llava_next", "phi3_v"])
def test_what_stays_is_counted_to_the_byte(root, tmp_path, family, changes):
    tiny_models.BUILDERS[family](tmp_path)
    recipe = load_recipe(write_recipe(root, model=str(tmp_path), output=str(tmp_path / "output"), **changes))
    counted = preflight.needs(recipe, describe(recipe.model))
    model = build_model(recipe)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert counted.weights == size([*model.parameters(), *model.buffers()])
    assert counted.gradients == size(trained)
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert counted.optimizer == size([t for state in optimizer.state.values() for name, t in state.items() if name != "step"])


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_shards_optimizers_and_four_bits(root):
    def needs(ranks=1, **changes):
        recipe = load_recipe(write_recipe(root, **changes))
        return preflight.needs(recipe, describe(recipe.model), ranks)

    whole, shared = needs(), needs(2, distributed="fsdp")
    assert needs(2) == whole, "DDP holds everything on every rank"
    assert shared.optimizer == whole.optimizer / 2 and shared.weights < 0.51 * whole.weights
    assert shared.gradients == whole.gradients, "whole until the last chunk's backward"
    frozen, halves = needs(freeze_vision=True), needs(2, distributed="fsdp", freeze_vision=True)
    tower = whole.gradients - frozen.gradients
    assert halves.weights == pytest.approx(tower + (frozen.weights - tower) / 2, rel=0.01), "a frozen tower is whole on every rank"
    eight = needs(optimizer="adamw_8bit")
    assert whole.optimizer / 4 < eight.optimizer < whole.optimizer, "weights of few numbers keep theirs in float32"
    assert needs(optimizer="paged_adamw_8bit").optimizer == 0
    assert needs(optimizer="sgd").optimizer == 0 and needs(optimizer="lion_8bit").optimizer == eight.optimizer / 2
    lora = {"r": 2, "vision": False, "dora": False}
    assert needs(lora=lora, quantization="nf4").weights < needs(lora=lora).weights


def test_a_recipe_that_cannot_fit_is_refused_with_sizes_and_mends(root, tmp_path, monkeypatch, unloaded):
    monkeypatch.setattr(preflight, "device_memory", lambda on_gpu: Memory(free=100 << 10, total=8 << 20))
    message = refused(root, tmp_path)
    recipe = load_recipe(write_recipe(root))
    need = preflight.needs(recipe, describe(recipe.model))
    assert f"weights {need.weights / GIB:.2f} GiB (float32)" in message and f"make {need.total / GIB:.2f} GiB before any chunk" in message
    for words in ("this machine has 0.00 GiB free of 0.01 GiB", "--lora", "--quantization nf4", "--distributed fsdp", "--dtype bfloat16"):
        assert words in message
    assert "--optimizer adamw_8bit" in message and "python -m train plan" in message
    less = refused(root, tmp_path, lora={"r": 64}, dtype="bfloat16", optimizer="adamw_8bit")
    assert "--lora)" not in less and "--dtype" not in less and "--optimizer" not in less, "what is done already is no mend"


def test_a_7b_model_in_full_does_not_fit_24_gib_and_its_adapter_does():
    """By the configs of this project, without the hub: the files of the model are not here."""

    def check(name, ranks=1, free=23.6):
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        model = Description(None, None, None, recipe.model, None, {}, {}, {})
        preflight.check_memory(recipe, model, Memory(int(free * GIB), int(free * GIB)), ranks=ranks, on_gpu=True)

    with pytest.raises(
        ValueError, match=r"weights 28\.86 GiB \(float32\), gradients 28\.86 GiB and adamw_torch 57\.7. GiB.*the GPU has 23\.60 GiB"
    ):
        check("qwen2-vl-7b-full-8x80gb-1k")
    with pytest.raises(ValueError, match="more than 1 GPU "):
        check("qwen2-vl-7b-full-8x80gb-1k", free=79.6)
    check("qwen2-vl-7b-full-8x80gb-1k", ranks=8, free=79.6)
    check("qwen2-vl-7b-lora-80gb", free=79.6)
    check("qwen2-vl-7b-qlora-24gb")
    check("qwen2-vl-2b-lora-24gb")


def test_ranks_of_one_machine_without_gpus_share_its_memory(root, monkeypatch):
    recipe = load_recipe(write_recipe(root))
    model = describe(recipe.model)
    total = preflight.needs(recipe, model).total
    preflight.check_memory(recipe, model, Memory(total, total), ranks=2, on_gpu=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="for each of 2 ranks"):
        preflight.check_memory(recipe, model, Memory(total, total), ranks=2, on_gpu=False)
    preflight.check_memory(recipe, model, Memory(total, total), ranks=2, on_gpu=True)
    preflight.check_memory(recipe, model, None, ranks=2, on_gpu=False)


def test_a_model_that_cannot_be_counted_is_trained_all_the_same(root, monkeypatch, caplog):
    def fails(*_):
        raise NotImplementedError("no meta kernel")

    monkeypatch.setattr(preflight, "needs", fails)
    recipe = load_recipe(write_recipe(root))
    with caplog.at_level(logging.INFO, logger="train.preflight"):
        preflight.check_memory(recipe, describe(recipe.model), Memory(1, 1), ranks=1, on_gpu=False)
    assert "memory is not checked" in caplog.text and "no meta kernel" in caplog.text


def test_memory_of_this_machine(tmp_path, monkeypatch):
    found = machine.device_memory(False)
    assert 0 < found.free <= found.total
    for name, text in (("memory.max", "3000\n"), ("memory.current", "2500\n"), ("memory.stat", "anon 1\ninactive_file 400\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    assert machine.device_memory(False) == Memory(free=900, total=3000), "the container's bound; cached files can go"
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.device_memory(False).total == found.total


# The machine and the model


def test_what_needs_a_gpu_is_refused_without_one(root, tmp_path, monkeypatch, unloaded):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no GPU here; give retain_mib" in refused(root, tmp_path, cpu=False, retain="auto")
    assert "autocast: float16 needs a GPU" in refused(root, tmp_path, cpu=False, autocast="float16")


def test_a_missing_package_is_named_before_loading(root, tmp_path, monkeypatch, unloaded):
    found = preflight.importlib.util.find_spec
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else found(name, *more))
    assert "pip install bitsandbytes" in refused(root, tmp_path, quantization="nf4", lora={"r": 2})


def test_what_the_model_cannot_do_is_refused_before_loading(root, tmp_path, unloaded):
    width = json.loads((root / "model" / "config.json").read_text())["text_config"]["hidden_size"]
    message = refused(root, tmp_path, loss={"matryoshka_dims": [8, width + 1]})
    assert f"matryoshka_dims: {width + 1} is above the {width} dimensions" in message
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(root / "model"), "r": 2}))
    assert "is an adapter and the recipe has no `lora:` section" in refused(root, tmp_path, model=str(adapter))


# Rows


@pytest.fixture
def long_rows(root, tmp_path):
    """The rows of the other tests, and a source of twenty rows whose last holds a large picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (560, 560, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "large.png")
    rows = [{"qry": f"row {i}", "qry_image_path": "", "pos_text": "yes", "pos_image_path": ""} for i in range(20)]
    rows[-1] |= {"pos_text": "<|image_1|>", "pos_image_path": "large.png"}
    write_train(tmp_path / "train", "Large", rows)
    data = {"root": str(tmp_path / "train"), "images": str(tmp_path / "images"), "sources": [{"name": "Large"}]}
    tokens = len(describe(str(root / "model")).processing({"text": "<|image_1|>", "image": tmp_path / "images" / "large.png"}).input_ids)
    assert tokens == 400  # 560 / 28 squared
    return data, tokens


def test_a_chunk_budget_below_the_longest_sample_is_refused_with_the_row(root, tmp_path, long_rows, unloaded):
    data, tokens = long_rows
    message = refused(root, tmp_path, data=data, chunk_tokens=tokens - 1)
    assert f"chunk_tokens ({tokens - 1}) is below the longest sample: Large, row 19 has {tokens} tokens" in message
    assert f"--chunk_tokens {tokens} or more" in message and "max_pixels" in message


def test_a_budget_of_the_longest_sample_is_enough(root, tmp_path, long_rows):
    data, tokens = long_rows
    assert run([str(write_recipe(root, data=data, chunk_tokens=tokens, output=str(tmp_path / "output"), steps=1))]) == 0
    shutil.rmtree(tmp_path / "output")
    assert run([str(write_recipe(root, data=data, chunk_rows=2, chunk_tokens=1, output=str(tmp_path / "output"), steps=1))]) == 0


def test_a_longer_sample_that_no_look_found_trains_in_a_chunk_of_its_own(root, tmp_path, long_rows, monkeypatch, caplog):
    data, tokens = long_rows
    monkeypatch.setattr(preflight, "check_rows", lambda recipe, processing: None)
    chunks, encode = [], ContrastiveStep._encode

    def counted(self, side, rows, features=None):
        chunks.append([side.lengths[row] for row in rows])
        return encode(self, side, rows, features)

    monkeypatch.setattr(ContrastiveStep, "_encode", counted)
    recipe = write_recipe(
        root, data=data, chunk_tokens=50, global_batch=20, interleave_batch_size=20, output=str(tmp_path / "output"), steps=3
    )
    with caplog.at_level(logging.WARNING, logger="train.trainer"):
        assert run([str(recipe)]) == 0
    long = [chunk for chunk in chunks if sum(chunk) > 50]
    assert long == [[tokens]] * 6, "three steps of two passes"
    warned = [record.getMessage() for record in caplog.records if "chunk_tokens" in record.getMessage()]
    assert warned == [f"Large, row 19 has {tokens} tokens, more than chunk_tokens (50): such samples are chunks of their own"]


def test_rows_are_looked_at_when_a_run_begins_and_not_when_it_goes_on(root, tmp_path, monkeypatch):
    looked = []
    check = preflight.check_rows
    monkeypatch.setattr(preflight, "check_rows", lambda recipe, processing: looked.append(check(recipe, processing)))
    recipe = write_recipe(root, output=str(tmp_path / "output"), save_steps=2)
    assert run([str(recipe)]) == 0 and len(looked) == 1
    (tmp_path / "output" / "train_result.json").unlink()
    shutil.rmtree(tmp_path / "output" / "checkpoint-4")
    assert run([str(recipe)]) == 0 and len(looked) == 1


def test_a_source_of_which_nothing_can_be_read_is_refused(root, tmp_path, unloaded):
    message = refused(root, tmp_path, "--data.images", str(tmp_path))
    assert message.startswith("source Pictures: 24 of 24 rows cannot be read") and "data.images" in message
    write_train(tmp_path / "train", "Few", [{"qry": "a <|image_1|>", "qry_image_path": "gone.jpg", "pos_text": "b", "pos_image_path": ""}])
    data = {"root": str(tmp_path / "train"), "images": str(tmp_path), "sources": [{"name": "Few"}]}
    assert "source Few: 1 of 1 rows cannot be read" in refused(root, tmp_path, data=data)


def test_strict_refuses_a_bad_row_before_loading(root, tmp_path, unloaded):
    path = root / "images" / "5.jpg"
    whole = path.read_bytes()
    path.unlink()
    try:
        assert "Pictures, row 5" in refused(root, tmp_path, "--data.strict")
    finally:
        path.write_bytes(whole)
