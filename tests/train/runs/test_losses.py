"""The losses that a recipe names: InfoNCE with all its options, the sigmoid loss with what it learns, and one that a test adds."""

import json
from dataclasses import dataclass, fields

import pytest
import torch
import yaml
from safetensors.torch import load_file

from contrastive_kernels import InfoNCEOptions, sigmoid_loss
from tests.helpers.tiny_recipe import first_batch, gradients, write_recipe
from train.build import build_model
from train.data.rows import to_features
from train.losses import LOSSES, Loss, LossBatch
from train.plan.batch import first_batch as planned_batch
from train.plan.simulate import simulate
from train.recipe.schema import load_recipe
from train.run import run
from train.step import ContrastiveStep
from train.trainer import ContrastiveTrainer

SIGMOID = {"loss": {"name": "sigmoid_loss", "scale": 5.0, "bias": -3.0}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    write_recipe(folder)
    return folder


def lines(output):
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def test_a_recipe_can_say_every_option_of_info_nce_that_is_no_tensor_of_a_batch():
    said = {field.name for field in fields(LOSSES["info_nce"])}
    tensors = {name for name, field in InfoNCEOptions.__dataclass_fields__.items() if field.metadata["schema"] == "Tensor?"}
    of_a_step = {"normalize", "ignore_index", "reduction", "group", "return_stats", "validate"}
    sections = {"name", "weight", "mask_duplicates", "learnable_temperature", "own_negatives_only", "matryoshka", "quantised"}
    assert set(InfoNCEOptions.__dataclass_fields__) - tensors - of_a_step == said - sections


def test_options_that_were_said_reach_the_loss(root, tmp_path):
    more = {"mask_margin": 0.2, "hardness": 0.5, "hardness_scope": "in_batch", "matryoshka_dims": [4, 8], "matryoshka_weights": [1, 0.5]}
    loss = load_recipe(write_recipe(root, output=str(tmp_path / "o"), loss={"temperature": 0.1, **more})).loss
    ids = torch.arange(4)
    options = loss.options(LossBatch(ids, ids))
    assert {name: options[name] for name in more} == more and options["temperature"] == 0.1 and options["target_ids"] is ids
    assert "hardness_scope" not in LOSSES["info_nce"]().options(LossBatch(ids, ids)), "what was not said is left to the loss"


@pytest.mark.parametrize(
    "loss,words",
    [
        ({"name": "sigmoidloss"}, "loss.name 'sigmoidloss' is unknown; did you mean sigmoid_loss"),
        ({"name": "zzz"}, "there are info_nce, sigmoid_loss"),
        ({"name": "sigmoid_loss", "scal": 3.0}, "unknown recipe key loss.scal; did you mean loss.scale"),
        ({"hardness_scope": "inbatch"}, "loss.hardness_scope: expected one of .* did you mean 'in_batch'"),
        ({"mask_margin": -3, "matryoshka_dims": [4], "matryoshka_weights": [1, 2]}, "loss.matryoshka_weights: expected 1 numbers"),
        ({"name": "sigmoid_loss", "scale": 0.0}, "loss.scale must be above 0"),
        ({"name": "sigmoid_loss", "exchange": "rings"}, "loss.exchange must be gather or ring"),
        ({"learnable_temperature": True, "temperature": 50.0}, "loss.temperature: expected a start within"),
    ],
    ids=str,
)
def test_what_a_loss_does_not_know_is_refused(root, tmp_path, loss, words):
    with pytest.raises(ValueError, match=words):
        load_recipe(write_recipe(root, output=str(tmp_path / "o"), loss=loss))


def test_sigmoid_is_another_name_of_the_sigmoid_loss(root, tmp_path):
    short, whole = (
        load_recipe(write_recipe(root, output=str(tmp_path / "o"), loss={"name": n, "scale": 5.0})) for n in ("sigmoid", "sigmoid_loss")
    )
    assert short.loss == whole.loss and type(short.loss) is LOSSES["sigmoid_loss"] and short.objective.words() == whole.objective.words()
    assert load_recipe(write_recipe(root, output=str(tmp_path / "o")), ["--loss.name", "sigmoid"]).loss.name == "sigmoid_loss"


@pytest.mark.parametrize(
    "loss", [{"temperature": {"learn": "source"}}, {"name": "distillation", "teacher": {"query": "q", "target": "t"}}], ids=str
)
def test_sources_of_one_name_are_refused_where_a_loss_tells_them(root, tmp_path, loss):
    data = yaml.safe_load((root / "data.yaml").read_text())
    data["sources"][1] |= {"name": "Pictures", "root": str(root / "train"), "split": "other"}
    changes = {"data": data, "output": str(tmp_path / "o")}
    load_recipe(write_recipe(root, **changes))
    with pytest.raises(
        ValueError, match=r"data.sources: expected a name of its own for each, by which loss \(\w+\) tells them, got .*Pictures"
    ):
        load_recipe(write_recipe(root, loss=loss, **changes))


def test_a_loss_without_hard_negatives_gets_none(root, tmp_path):
    with pytest.raises(ValueError, match="data.hard_negatives: sigmoid_loss has no place for them"):
        load_recipe(write_recipe(root, output=str(tmp_path / "o"), **SIGMOID), ["--data.hard_negatives", "true"])


def test_a_step_of_the_sigmoid_loss_has_the_gradients_of_the_whole_batch(root, tmp_path):
    recipe = load_recipe(write_recipe(root, output=str(tmp_path / "o"), dtype="float64", chunk_tokens=60, **SIGMOID))
    model = build_model(recipe).train()
    batch = first_batch(recipe, model)
    loss = recipe.loss.function().double()
    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"), loss=loss)
    result, _ = step(first_batch(recipe, model))
    got, learned = gradients(model), (loss.log_scale.grad.clone(), loss.bias.grad.clone())
    model.zero_grad()
    sides = [[to_features(sample) for sample in batch[name]] for name in ("query", "target")]
    for side in sides:
        for features in side:
            if features.pending:
                features.vision |= {
                    "pixel_values": model.processing.normalised(model.processing.decode(features)["pixel_values"], features.vision).double()
                }
                features.pending = []
    query, target = (torch.nn.functional.normalize(model(model.pack(side)), dim=-1) for side in sides)
    log_scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (torch.tensor(5.0).log().double().item(), -3.0))
    ids = torch.from_numpy(batch["target_ids"])
    signs = torch.where(ids[:, None] == ids[None, :], 1.0, -1.0)
    truth = -torch.nn.functional.logsigmoid(signs * (log_scale.exp() * query @ target.T + bias)).sum(1).mean()
    truth.backward()
    assert float(result.loss) == pytest.approx(truth.item(), rel=1e-6)
    for name, value in gradients(model).items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-8, msg=name)
    torch.testing.assert_close(torch.cat(learned), torch.stack([log_scale.grad, bias.grad]), rtol=1e-5, atol=1e-8)
    same = sigmoid_loss(query, target, scale=log_scale.exp(), bias=bias, target_ids=ids)
    assert same.item() == pytest.approx(truth.item(), rel=1e-9)


@pytest.mark.parametrize(
    "changes", [SIGMOID, {"loss": {"learnable_temperature": True, "temperature": 0.1}}], ids=["sigmoid", "temperature"]
)
def test_what_a_loss_learns_is_trained_kept_and_taken_up_again(root, tmp_path, monkeypatch, changes):
    """A run that is stopped and goes on ends with the bits of one that was not."""
    ends = []
    for name in ("whole", "stopped"):
        output = tmp_path / name
        recipe = str(write_recipe(root, output=str(output), save_steps=2, dtype="float64", weight_decay=0.1, **changes))
        if name == "stopped":
            training_step = ContrastiveTrainer.training_step

            def killed(self, *args, original=training_step, **kwargs):
                if self.state.global_step == 2:
                    raise RuntimeError("killed")
                return original(self, *args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(ContrastiveTrainer, "training_step", killed)
                with pytest.raises(RuntimeError, match="killed"):
                    run([recipe])
            assert (output / "checkpoint-2" / "loss.safetensors").is_file()
        assert run([recipe]) == 0
        saved = load_file(output / "loss.safetensors")
        ends.append((saved, load_file(output / "model.safetensors"), lines(output)[-1]))
        assert "loss.safetensors" in json.loads((output / "train_result.json").read_text())["files"]
    (saved, weights, last), (saved_again, weights_again, last_again) = ends
    figures = ("scale", "bias") if "name" in changes["loss"] else ("temperature",)
    starts = {"scale": 5.0, "bias": -3.0, "temperature": 0.1}
    for figure in figures:
        assert last[figure] == last_again[figure] and last[figure] != pytest.approx(starts[figure], rel=1e-6), "it moved"
    for name in saved:
        assert torch.equal(saved[name], saved_again[name])
    assert weights.keys() == weights_again.keys() and not any("loss" in name for name in weights)
    for name in weights:
        assert torch.equal(weights[name], weights_again[name]), name


def test_a_plan_of_the_sigmoid_loss(root, tmp_path):
    for ranks in (1, 2):
        recipe = load_recipe(write_recipe(root, output=str(tmp_path / "o"), **SIGMOID))
        plan = simulate(recipe, None, ranks=ranks, make_batch=lambda processing, r=recipe, n=ranks: planned_batch(r, processing, n))
        assert plan.peak > plan.resident > 0 and plan.cost.flops > 0


def test_a_loss_that_a_test_adds_trains_through_a_recipe(root, tmp_path, monkeypatch):
    @dataclass
    class Triplet(Loss):
        name: str = "triplet"
        margin: float = 0.3

        def function(self):
            def triplet(query, target, query_mask=None, target_mask=None):
                cosines = torch.nn.functional.normalize(query, dim=1) @ torch.nn.functional.normalize(target, dim=1).T
                return (self.margin + cosines - cosines.diagonal()[:, None]).relu().mean()

            return triplet

    monkeypatch.setitem(LOSSES, "triplet", Triplet)
    output = tmp_path / "output"
    changes = {"loss": {"name": "triplet", "margin": 0.5}, "held_out": {"rows": 2, "steps": 2}}
    assert run([str(write_recipe(root, output=str(output), steps=12, learning_rate=3e-3, **changes))]) == 0
    losses = [entry["loss"] for entry in lines(output)]
    assert len(losses) == 12 and losses[0] > 0.1 and min(losses[-3:]) < losses[0]
    assert "triplet" in (output / "README.md").read_text()
    with pytest.raises(ValueError, match="did you mean loss.margin"):
        load_recipe(write_recipe(root, output=str(tmp_path / "o"), loss={"name": "triplet", "margn": 0.5}))
