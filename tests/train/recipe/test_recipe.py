"""Recipes: overrides, the reference's flags, and refusals that name the key and the mend."""

import pytest
import torch
import yaml

from train.recipe.checks import SCHEDULES
from train.recipe.schema import load_recipe

BASE = {
    "model": "m",
    "output": "o",
    "steps": 10,
    "global_batch": 64,
    "data": {"root": "r", "images": "i", "sources": [{"name": "a"}, {"name": "b", "weight": 2}]},
}


@pytest.fixture
def recipe(tmp_path):
    def write(overrides=(), **changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(BASE | changes))
        return load_recipe(path, list(overrides))

    return write


def test_defaults_and_nested_overrides(recipe):
    loaded = recipe(["--loss.temperature", "0.05", "--steps=20", "--learning_rate", "2e-5"])
    assert (loaded.loss.temperature, loaded.steps, loaded.learning_rate) == (0.05, 20, 2e-5)
    assert loaded.interleave_batch_size == 64
    assert loaded.data.sources[1].weight == 2.0


def test_resolved_recipe_reloads_as_itself(recipe, tmp_path):
    loaded = recipe(["--lora", "--lora_r", "8"])
    path = tmp_path / "resolved.yaml"
    path.write_text(loaded.to_yaml())
    assert load_recipe(path) == loaded


def test_reference_command_line(recipe):
    words = "--pooling eos --normalize --temperature 0.03 --grad_cache --interleave_batch_size 16 --lora --lora_r 8 --max_steps 5"
    loaded = recipe(words.split())
    assert (loaded.loss.temperature, loaded.interleave_batch_size, loaded.lora.r, loaded.steps) == (0.03, 16, 8, 5)


@pytest.mark.parametrize(
    "overrides,changes,words",
    [
        (["--temprature", "1"], {}, "unknown recipe key temprature"),
        (["--loss.temprature", "1"], {}, "did you mean loss.temperature"),
        (["--globalbatch", "1"], {}, "did you mean global_batch"),
        (["--interleave_batch_size", "48"], {}, "must divide global_batch"),
        (["--temperature", "0"], {}, "loss.temperature: expected a number above 0, got 0.0"),
        (["--steps", "many"], {}, "steps must be of type int"),
        (["--steps", "0"], {}, "steps must be at least 1"),
        (["--pooling", "mean"], {}, "not supported"),
        (["--quantization", "nf4"], {}, "cannot be trained in full"),
        (["--quantization", "int3"], {}, "quantization must be"),
        (["--gc_q_chunk_size", "0"], {}, "gc_q_chunk_size must be a whole number"),
        (["--num_train_epochs", "3"], {}, "pass --steps"),
        (["--optimizer", "paged_adamw8bit"], {}, "did you mean paged_adamw"),
        (["--distributed", "zero3"], {}, 'must be "ddp" or "fsdp"'),
        (["--model_options.max_length", "9000"], {}, "below the longest sample"),
        (["--lora", "--lora.vision", "true", "--freeze_vision", "true"], {}, "contradict"),
        (["--lora", "--quantization", "nf4", "--distributed", "fsdp"], {}, "cannot be sharded"),
        (["--lora", "--lora.r", "0"], {}, "lora.r must be at least 1"),
        (["--lora", "--lora.alpha", "-3"], {}, "lora.alpha must be a number above 0"),
        (["--lora", "--lora.alpha", "nan"], {}, "lora.alpha must be a number above 0"),
        (["--temperature", "[1,"], {}, "--temperature: expected a number, a word or a list"),
        (["--"], {}, "expected --key value, got '--'"),
        (["--loss", "3"], {}, "^loss must be a mapping"),
        (["word"], {}, "expected --key value"),
        ([], {"data": {"root": "r", "images": "i", "sources": []}}, "names no data set"),
        ([], {"data": {"root": "r", "sources": [{"name": "a"}]}}, "lacks data.images"),
        (["--warmup_steps", "11"], {}, "exceeds steps"),
        (["--lr_schedule", "cosin"], {}, "lr_schedule 'cosin' is unknown; did you mean cosine?"),
        (["--lr_schedule", "reduce_lr_on_plateau"], {}, "lr_schedule 'reduce_lr_on_plateau' is unknown; there are linear"),
        (["--learning_rate", "0"], {}, "learning_rate must be above 0, got 0.0"),
        (["--learning_rate", "-1e-5"], {}, "learning_rate must be above 0"),
        (["--learning_rate", "nan"], {}, "learning_rate must be above 0"),
        (["--loss.hardness", "-1"], {}, "loss.hardness must be 0 or more, got -1.0"),
        (["--loss.label_smoothing", "1"], {}, "loss.label_smoothing: expected"),
        (["--loss.matryoshka_dims", "0", "8"], {}, "loss.matryoshka_dims must list widths of at least 1"),
        (["--media_mib", "-1"], {}, "media_mib must be 0 or more, got -1.0"),
        (["--keep_mib", "-0.5"], {}, "keep_mib must be 0 or more"),
        (["--retain_mib", "-1"], {}, "retain_mib must be 0 or more"),
        (["--workers", "-1"], {}, "workers must be 0 or more, got -1"),
        (["--weight_decay", "-0.1"], {}, "weight_decay must be 0 or more"),
        (["--max_grad_norm", "-1"], {}, "max_grad_norm must be 0 or more"),
        (["--warmup_steps", "-1"], {}, "warmup_steps must be 0 or more"),
        (["--seed", "-1"], {}, "seed must be from 0"),
        (["--data.rows", "0"], {}, "data.rows must be at least 1"),
        ([], {"data": {"root": "r", "images": "i", "sources": [{"name": "a", "weight": 0}]}}, "source a: weight must be above 0, got 0.0"),
        ([], {"data": {"root": "r", "images": "i", "sources": [{"name": "a", "rows": 0}]}}, "source a: rows must be at least 1"),
        ([], {"data": {"root": "r", "images": "i", "sources": [{"name": "a", "from_step": 2}]}}, "the first step has no rows"),
        (["--retain", "auto", "--cpu"], {}, "retain: auto measures free GPU memory.*give retain_mib"),
        (
            ["--retain", "auto", "--offload_activations", "true"],
            {},
            "retain: auto and offload_activations contradict each other: .*give retain_mib .*drop offload_activations",
        ),
        (["--fp16", "--distributed", "fsdp"], {}, "autocast: float16 .* choose autocast: bfloat16, or distributed: ddp"),
        (["--fp16", "--cpu"], {}, "autocast: float16 needs a GPU"),
        (["--fp16", "--dtype", "float16"], {}, "choose dtype: float32"),
        (["--autocast", "float64"], {}, "autocast must be bfloat16, float16 or left out"),
        (["--report_to", "tensorbord"], {}, "report_to: 'tensorbord' is unknown; did you mean tensorboard?"),
        (["--optimizer", "galore_adamw"], {}, "optimizer galore_adamw needs galore_torch; pip install galore-torch, or choose adamw_torch"),
    ],
)
def test_refusals(recipe, overrides, changes, words):
    with pytest.raises(ValueError, match=words):
        recipe(overrides, **changes)


def test_a_file_that_is_no_recipe(tmp_path):
    with pytest.raises(ValueError, match="not a file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="must be a mapping"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_a_batch_that_ranks_cannot_share_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    from train.run import run

    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**BASE, "model": "no/such-model", "output": str(tmp_path / "o")}))
    monkeypatch.setenv("WORLD_SIZE", "24")
    with pytest.raises(ValueError, match=r"global_batch \(64\) must be divisible by the number of ranks \(24\); 72 is"):
        run([str(path)])


def test_every_schedule_that_is_let_through_can_be_made(recipe):
    from transformers import get_scheduler

    for name in SCHEDULES:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        schedule = get_scheduler(recipe(lr_schedule=name).lr_schedule, optimizer, num_warmup_steps=2, num_training_steps=6)
        for _ in range(6):
            optimizer.step()
            schedule.step()
        assert 0 <= optimizer.param_groups[0]["lr"] <= 1


def test_retain_auto_is_taken_with_a_bound(recipe):
    assert recipe(["--retain", "auto", "--retain_mib", "64", "--cpu"]).retain == "auto"
    assert recipe(["--retain", "auto", "--retain_mib", "64", "--offload_activations", "true"]).retain == "auto"
    assert recipe(["--retain", "auto"]).retain == "auto", "a recipe for a GPU can be read and planned anywhere"
