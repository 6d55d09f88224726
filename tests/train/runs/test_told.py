"""What a run tells: figures that are true, on a bar of the main process, in the log, in the result and in the model card."""

import contextlib
import io
import json
import types

import pytest
import torch
import yaml

from tests.helpers.tiny_recipe import first_batch, write_recipe
from train.build import build_model
from train.data.rows import to_features
from train.recipe.schema import load_recipe
from train.reports import callbacks
from train.reports.callbacks import Progress
from train.reports.metrics import StepStats
from train.run import run

CHANGES = {"dtype": "float64", "seed": 3, "loss": {"temperature": 0.1}, "lora": {"r": 2, "dropout": 0.0, "dora": False}, "chunk_tokens": 60}


class Bar:
    """A tqdm that keeps what it is told."""

    made: list = []

    def __init__(self, **options):
        self.options, self.n, self.shown, self.closed = options, options["initial"], [], False
        Bar.made.append(self)

    def update(self, count):
        self.n += count

    def set_postfix(self, figures, refresh):
        self.shown.append(dict(figures))

    def close(self):
        self.closed = True


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """One run: its folder, recipe, log, bar and what it printed."""
    root = tmp_path_factory.mktemp("told")
    output = root / "output"
    path = write_recipe(root, output=str(output), **CHANGES)
    Bar.made.clear()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(callbacks, "tqdm", Bar)
        assert run([str(path), "--keep_mib", "64"]) == 0
    (bar,) = Bar.made
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return types.SimpleNamespace(
        root=root, output=output, path=path, bar=bar, log=[entry for entry in log if "loss" in entry], printed=printed.getvalue()
    )


def test_figures_of_the_first_step_are_those_of_its_embeddings(told):
    """Everything worked out anew from the whole batch in float64."""
    recipe = load_recipe(told.path)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe).train()
    batch = first_batch(recipe, model)
    sides = [[to_features(sample) for sample in batch[name]] for name in ("query", "target")]
    for side in sides:
        for features in side:
            if features.pending:
                features.vision |= {
                    "pixel_values": model.processing.normalised(model.processing.decode(features)["pixel_values"], features.vision).double()
                }
                features.pending = []
    query, target = (torch.nn.functional.normalize(model(model.pack(side)), dim=-1) for side in sides)
    cosines = query @ target.T
    loss = torch.nn.functional.cross_entropy(cosines / 0.1, torch.arange(8))
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    others = cosines.masked_fill(torch.eye(8, dtype=torch.bool), -2)
    first = told.log[0]
    assert first["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert first["accuracy"] == pytest.approx((cosines.argmax(1) == torch.arange(8)).double().mean().item(), abs=1e-4)
    assert first["positive_similarity"] == pytest.approx(cosines.diagonal().mean().item(), abs=1e-4)
    assert first["hardest_negative_similarity"] == pytest.approx(others.amax(1).mean().item(), abs=1e-4)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert first["temperature"] == 0.1
    lengths = [[len(features.input_ids) for features in side] for side in sides]
    padded = sum(8 * max(side) for side in lengths)
    assert first["padding_avoided"] == pytest.approx(1 - sum(map(sum, lengths)) / padded, abs=1e-4)
    assert first["tokens_per_second"] / first["samples_per_second"] == pytest.approx(sum(map(sum, lengths)) / 8, rel=1e-3)


def test_rates_and_means_are_of_the_steps_since_the_line_before(monkeypatch):
    clock = iter([10.0, 12.0, 12.0, 20.0, 20.0])
    monkeypatch.setattr("train.reports.metrics.time.perf_counter", lambda: next(clock))
    stats = StepStats()

    def step(accuracy, lengths):
        figures = types.SimpleNamespace(
            accuracy=torch.tensor(accuracy), positive_cosine=torch.tensor(0.5), hardest_negative_cosine=torch.tensor(0.25)
        )
        stats.add(types.SimpleNamespace(stats=figures), lengths)

    step(0.5, [[10, 30], [5, 5]])
    step(1.0, [[20, 20], [4, 6], [7]])  # with a negative
    line = stats.drain(torch.device("cpu"), 2)
    assert (line["samples_per_second"], line["tokens_per_second"]) == (4 * 2 / 2, 107 * 2 / 2), "of both ranks, in two seconds"
    assert line["accuracy"] == 0.75 and line["positive_similarity"] == 0.5 and line["hardest_negative_similarity"] == 0.25
    assert line["padding_avoided"] == pytest.approx(1 - 107 / (60 + 10 + 40 + 12 + 7), abs=1e-4)
    assert line["peak_memory_mib"] > 50
    step(0.25, [[8], [8]])
    line = stats.drain(torch.device("cpu"), 1)
    assert (line["samples_per_second"], line["tokens_per_second"], line["accuracy"], line["padding_avoided"]) == (1 / 8, 2.0, 0.25, 0)
    assert stats.drain(torch.device("cpu"), 1) == {}, "no step, no line"


def test_the_bar_shows_the_figures_of_the_log(told):
    assert told.bar.options["total"] == told.bar.n == 4 and told.bar.options["initial"] == 0 and told.bar.closed
    named = {
        "loss": "loss",
        "acc": "accuracy",
        "pos": "positive_similarity",
        "neg": "hardest_negative_similarity",
        "T": "temperature",
        "grad": "grad_norm",
        "lr": "learning_rate",
        "samples/s": "samples_per_second",
        "tokens/s": "tokens_per_second",
        "unpadded": "padding_avoided",
        "MiB": "peak_memory_mib",
    }
    for entry, shown in zip(told.log, told.bar.shown, strict=False):
        assert named.keys() <= shown.keys()
        for short, name in named.items():
            # Three digits, or whole numbers.
            assert float(shown[short].replace(",", "")) == pytest.approx(entry[name], rel=0.006, abs=0.5 if entry[name] >= 1000 else 0), (
                short
            )


def test_the_bar_is_the_main_processs_alone(monkeypatch):
    Bar.made.clear()
    monkeypatch.setattr(callbacks, "tqdm", Bar)
    for main in (False, True):
        progress = Progress()
        state = types.SimpleNamespace(is_world_process_zero=main, max_steps=9, global_step=3)
        progress.on_train_begin(None, state, None)
        progress.on_log(None, state, None, logs={"loss": 1.0})
        state.global_step = 4
        progress.on_step_end(None, state, None)
        progress.close()
    (bar,) = Bar.made
    assert (bar.options["initial"], bar.n, bar.shown) == (3, 4, [{"loss": "1"}]), "a run that goes on begins where it stopped"


def test_the_resolved_recipe_is_printed_and_saved(told):
    resolved = load_recipe(told.path, ["--keep_mib", "64"])
    assert resolved.keep_mib == 64
    assert told.printed.startswith(resolved.to_yaml()), "the first thing that a run prints"
    assert load_recipe(told.output / "recipe.yaml") == resolved
    assert set(yaml.safe_load((told.output / "recipe.yaml").read_text())) == set(resolved.to_dict()), "every key"
    result = json.loads((told.output / "train_result.json").read_text())
    assert result["recipe"] == resolved.to_dict() and result["steps"] == 4
    assert (result["loss"], result["accuracy"]) == (told.log[-1]["loss"], told.log[-1]["accuracy"])
    for words in (f"starting from {told.root / 'model'}", "training ", "trained 4 steps"):
        assert words in told.printed


def test_the_model_card(told):
    card = (told.output / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["library_name"] == "vlm2vec" and {"lora", "qwen2_vl", "multimodal-embedding"} <= set(header["tags"])
    assert "base_model" not in header, "a folder of this machine is no name on the hub"
    recipe = load_recipe(told.output / "recipe.yaml")
    model = build_model(recipe)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    for words in (
        f"`{told.root / 'model'}`",
        f"LoRA adapter of rank 2 ({trained:,} of {total:,} parameters)",
        "for 4 steps of 8 pairs at temperature 0.1",
        "| Pictures | 66.7% | all |",
        "| Texts | 33.3% | all |",
        f"`{recipe.data.root}`, split `original`; 4 rows in a row",
        f'VLM2Vec.from_pretrained("{told.output}")',
        "Find me an everyday image that matches the given caption: a caption\\n",
        f"vlm2vec embed {told.output} PICTURES --as document -o",
        f"vlm2vec eval {told.output} --data",
        f"vlm2vec train {told.output}/recipe.yaml",
    ):
        assert words in body, words
    last = told.log[-1]
    for words, name in (("loss (nats)", "loss"), ("in-batch accuracy", "accuracy"), ("similarity of positives", "positive_similarity")):
        assert f"| {words} | {last[name]:.4g} |" in body
    written = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(written) == recipe.to_dict()


def test_the_card_of_a_hub_model_names_its_base(told):
    from train.reports.card import model_card

    recipe = load_recipe(told.path, ["--model", "Qwen/Qwen2-VL-2B-Instruct", "--quantization", "nf4"])
    made = {"base": recipe.model, "family": "qwen2_vl", "trained": 1, "total": 2, "steps": 4, "figures": {}}
    card = model_card(recipe, **made)
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["base_model"], header["base_model_relation"]) == ("Qwen/Qwen2-VL-2B-Instruct", "adapter")
    assert "LoRA adapter of rank 2, base in four bits (NF4)" in card
    recipe.lora, recipe.quantization = None, None
    assert yaml.safe_load(model_card(recipe, **made).split("---\n")[1])["base_model_relation"] == "finetune"
    recipe.freeze_vision = True
    assert "all weights but the vision tower's" in model_card(recipe, **made)
