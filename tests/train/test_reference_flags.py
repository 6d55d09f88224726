"""Command lines of the reference: the same words train the same thing here, or are refused with the reason."""

import pytest
import yaml

from train.recipe import load_recipe
from train.reference_flags import ALWAYS, NEEDLESS, REFUSED, RENAMED, parse_overrides

BASE = {
    "model": "m",
    "output": "o",
    "steps": 10,
    "global_batch": 64,
    "data": {"root": "r", "images": "i", "sources": [{"name": "a"}]},
}


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


def test_every_name_of_the_table_is_a_key_of_the_recipe(load):
    recipe = load("--lora --model_options.min_pixels 1")
    for flag, key in RENAMED.items():
        section, holder = recipe, None
        for part in key.split("."):
            holder, section = section, getattr(section, part, None) if not isinstance(section, dict) else section.get(part)
        known = isinstance(holder, dict) or hasattr(holder, key.rpartition(".")[2])
        assert known, f"--{flag} stands for {key}, which no recipe has"
    assert not set(RENAMED) & (set(ALWAYS) | set(NEEDLESS) | set(REFUSED))


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
