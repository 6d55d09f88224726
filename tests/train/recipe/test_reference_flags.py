"""Command lines of the reference: the same words train the same thing here, or are refused with the reason."""

import pytest
import yaml

from train.plan.__main__ import main as plan_main
from train.recipe.reference_flags import ALWAYS, NEEDLESS, REFUSED, RENAMED, parse_overrides
from train.recipe.schema import load_recipe
from vlm2vec.backbones import FAMILIES, backbone_for

BASE = {"model": "m", "output": "o", "steps": 10, "global_batch": 64, "data": {"root": "r", "images": "i", "sources": [{"name": "a"}]}}


@pytest.fixture
def load(tmp_path):
    def read(words):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(BASE))
        return load_recipe(path, words.split())

    return read


def test_a_released_command_line(load, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    recipe = load(
        "--lora --lora_r 16 --model_name Qwen/Qwen2-VL-2B-Instruct --bf16 --pooling eos --normalize True --temperature 0.02 "
        "--dataloader_num_workers 8 --dataset_name TIGER-Lab/MMEB-train --subset_name ImageNet_1K N24News --dataset_split original "
        "--num_sample_per_subset 50000 --image_dir MMEB-train --max_len 4096 --output_dir out --logging_steps 1 "
        "--lr_scheduler_type linear --learning_rate 2e-5 --max_steps 2000 --warmup_steps 200 --save_steps 200 "
        "--per_device_train_batch_size 128 --interleave_batch_size 64 --grad_cache True --gc_q_chunk_size 8 --gc_p_chunk_size 4 "
        "--model_backbone qwen2_vl --remove_unused_columns False --ddp_find_unused_parameters True"
    )
    assert recipe.lora.r == 16 and recipe.lora.dora and recipe.lora.alpha == 64
    assert (recipe.model, recipe.output, recipe.autocast) == ("Qwen/Qwen2-VL-2B-Instruct", "out", "bfloat16")
    assert (recipe.global_batch, recipe.interleave_batch_size, recipe.chunk_rows) == (1024, 64, 4)
    assert [source.name for source in recipe.data.sources] == ["ImageNet_1K", "N24News"]
    assert (recipe.data.root, recipe.data.images, recipe.data.rows) == ("TIGER-Lab/MMEB-train", "MMEB-train", 50000)
    assert (recipe.steps, recipe.warmup_steps, recipe.learning_rate, recipe.lr_schedule) == (2000, 200, 2e-5, "linear")
    assert recipe.model_options == {"max_length": 4096}
    assert recipe.workers == 8


# A value for each flag that its key does not have by default.
VALUES = {
    "model_name": "other",
    "output_dir": "elsewhere",
    "max_steps": 7,
    "temperature": 0.3,
    "lora_r": 5,
    "lora_alpha": 3.0,
    "lora_dropout": 0.25,
    "lora_target_modules": ["q_proj"],
    "image_encoder_freeze": True,
    "lr_scheduler_type": "cosine",
    "dataloader_num_workers": 3,
    "save_total_limit": 9,
    "optim": "sgd",
    "dataset_name": "set",
    "dataset_split": "diverse_instruction",
    "image_dir": "pictures",
    "data_basedir": "pictures",
    "max_len": 512,
    "num_crops": 16,
    "image_resolution": "mid",
    "resize_min_pixels": 784,
    "resize_max_pixels": 7840,
}


@pytest.mark.parametrize("flag", RENAMED)
def test_a_renamed_flag_changes_its_key_and_no_other(load, flag):
    before, recipe = load("--lora").to_dict(), load(f"--lora --{flag} {' '.join(map(str, listed(VALUES[flag])))}").to_dict()
    changed = {key for key in flat(recipe) if flat(recipe)[key] != flat(before).get(key)}
    assert changed == {RENAMED[flag]}
    assert flat(recipe)[RENAMED[flag]] == VALUES[flag]


def listed(value):
    return value if isinstance(value, list) else [value]


def flat(values, where=""):
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return found


def test_options_of_the_model_are_those_of_a_family():
    known = set()
    for name in FAMILIES:
        processing = backbone_for(name).processing_class
        known |= {*processing.shared_defaults, *processing.defaults}
    options = {key.removeprefix("model_options.") for key in RENAMED.values() if key.startswith("model_options.")}
    assert len(options) == 5 and options <= known
    assert not set(RENAMED) & (set(ALWAYS) | set(NEEDLESS) | set(REFUSED))


def test_lora_is_the_switch(load, tmp_path):
    with pytest.raises(ValueError, match="--lora_r without --lora .* would train all weights; add --lora"):
        load("--lora_r 8")
    assert load("--lora_r 8 --lora").lora.r == 8
    assert load("--lora True --lora_r 8").lora.r == 8
    assert load("--lora False --lora_r 8").lora is None, "as in the reference: the number says nothing where the switch is off"
    assert load("--lora.r 8").lora.r == 8, "a section named in full is one"
    path = tmp_path / "with.yaml"
    path.write_text(yaml.safe_dump(BASE | {"lora": {"r": 4}}))
    assert load_recipe(path, ["--lora_r", "8"]).lora.r == 8
    assert load_recipe(path, "--lora false --lora_r 8".split()).lora is None


def test_a_share_of_one_process_counts_for_the_ranks_that_are_planned(load, tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE))
    words = ["--per_device_train_batch_size", "128"]
    assert load_recipe(path, words, ranks=8).global_batch == 1024
    assert load_recipe(path, words).global_batch == 128
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert load_recipe(path, words).global_batch == 512
    planned = {}

    def stop(recipe, gpu, ranks, **options):
        planned.update(batch=recipe.global_batch, ranks=ranks)
        raise ValueError("seen")

    monkeypatch.setattr("train.plan.__main__.make_plan", stop)
    with pytest.raises(ValueError, match="seen"):
        plan_main([str(path), "--gpu", "h100-80", "--ranks", "8", *words])
    assert planned == {"batch": 1024, "ranks": 8}


@pytest.mark.parametrize(
    "words,reason",
    [
        ("--pooling mean", "always uses eos"),
        ("--normalize False", "always uses true"),
        ("--grad_cache false", "always uses true"),
        ("--remove_unused_columns True", "always uses false"),
        ("--deepspeed ds.json", "every backward"),
        ("--per_device_train_batch_size many", "whole number"),
        ("--lora_q 3", "unknown recipe key lora_q"),
    ],
)
def test_what_means_something_else_is_refused(load, words, reason):
    with pytest.raises(ValueError, match=reason):
        load(words)


def test_spellings_of_a_value():
    assert parse_overrides("--a=1 --b 2 --c --d x y".split()) == [("a", 1), ("b", 2), ("c", True), ("d", ["x", "y"])]
