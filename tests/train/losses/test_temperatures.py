"""Temperatures that are learned: one, one a source, one a kind of pair; what they get, how they are logged, kept and taken up again."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from contrastive_kernels import info_nce
from tests.helpers.tiny_recipe import first_batch, write_recipe
from train.build import build_model
from train.losses import InfoNCE, LossBatch
from train.losses.temperature import PAIRS, RowTemperatures
from train.plan.batch import first_batch as planned_batch
from train.plan.simulate import simulate
from train.recipe.from_yaml import build
from train.recipe.schema import load_recipe
from train.run import run
from train.step import ContrastiveStep
from train.trainer import ContrastiveTrainer

SOURCE = {"temperature": {"start": 0.1, "learn": "source"}}
MODALITY = {"temperature": {"start": 0.1, "learn": "modality"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("temperatures")
    write_recipe(folder)
    return folder


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_row_divides_by_its_own_and_its_gradient_goes_there(symmetric):
    generator = torch.Generator().manual_seed(0)
    query, target = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    module = RowTemperatures(("a", "b", "c"), 0.2).double()
    with torch.no_grad():
        module.log_temperature += torch.tensor([0.0, 0.7, 0.3])
    of = torch.tensor([0, 1, 1, 0, 1, 0])
    module(query, target, temperature_of=of, normalize=True, symmetric=symmetric).backward()
    logs = module.log_temperature.detach().clone().requires_grad_()
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (query, target)]
    cosines = unit[0] @ unit[1].T
    own = logs.exp()[of][:, None]
    truth = torch.nn.functional.cross_entropy(cosines / own, torch.arange(6))
    if symmetric:
        truth = (truth + torch.nn.functional.cross_entropy(cosines.T / own, torch.arange(6))) / 2
    truth.backward()
    torch.testing.assert_close(module.log_temperature.grad, logs.grad, rtol=1e-10, atol=1e-12)
    assert module.log_temperature.grad[2] == 0 and module.log_temperature.grad[:2].all()


def test_at_a_bound_only_the_gradient_that_leads_back_passes():
    for value, passes in ((math.log(0.001) - 1, -1.0), (math.log(10.0) + 1, 1.0)):
        module = RowTemperatures(("a",), 0.2)
        with torch.no_grad():
            module.log_temperature.fill_(value)
        for sign in (1.0, -1.0):
            module.log_temperature.grad = None
            (sign * module.temperatures()).backward()
            assert bool(module.log_temperature.grad) == (sign == passes)
        assert float(module.temperatures().detach()) == pytest.approx(min(max(math.exp(value), 0.001), 10.0))


def test_what_is_logged_are_temperatures_that_moved():
    module = RowTemperatures(PAIRS, 0.1)
    assert module.figures() == {} and module.no_weight_decay() == {"log_temperature"}
    with torch.no_grad():
        module.log_temperature[3] += 0.5
    assert module.figures() == {"temperature_image_text": pytest.approx(0.1 * math.exp(0.5))}


def test_a_step_gives_each_source_the_gradient_of_its_rows(root, tmp_path):
    recipe = load_recipe(write_recipe(root, output=str(tmp_path / "o"), dtype="float64", loss=SOURCE))
    model = build_model(recipe).train()
    batch = next(b for b in (first_batch(recipe, model, s) for s in range(4)) if {source for source, _ in b["rows"]} == {0, 1})
    loss = recipe.objective.function().double()
    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"), loss=loss)
    result, _ = step(batch)
    with torch.no_grad():
        sides = [step.media.side(batch[name], range(8), lambda *_: None) for name in ("query", "target")]
        query, target = (step.embed(side, list(range(8))) for side in sides)
    ids = {name: torch.from_numpy(batch[name]) for name in ("query_ids", "target_ids")}
    of = torch.tensor([source for source, _ in batch["rows"]])
    logs = torch.full((2,), math.log(0.1), dtype=torch.float64, requires_grad=True)
    truth = info_nce(query, target, temperature=logs.exp()[of], normalize=True, target_query_ids=ids["query_ids"], **ids)
    truth.backward()
    assert result.loss.item() == pytest.approx(truth.item(), rel=1e-6)
    torch.testing.assert_close(loss.log_temperature.grad, logs.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("section", [SOURCE, MODALITY], ids=["source", "modality"])
def test_a_run_learns_keeps_and_takes_them_up_again(root, tmp_path, monkeypatch, section):
    ends = []
    for name in ("whole", "stopped") if section is SOURCE else ("whole",):
        output = tmp_path / name
        options = {"save_steps": 2, "weight_decay": 0.1, "held_out": {"rows": 2, "steps": 4}, "loss": section}
        recipe = str(write_recipe(root, output=str(output), **options))
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
        assert run([recipe]) == 0
        log = json.loads((output / "trainer_state.json").read_text())["log_history"]
        ends.append((load_file(output / "loss.safetensors"), [line for line in log if "loss" in line][-1], log))
    (saved, last, log), (again, last_again, _) = ends[0], ends[-1]
    assert torch.equal(saved["log_temperature"], again["log_temperature"]) and saved["log_temperature"].dtype == torch.float32
    names = {"temperature_Pictures", "temperature_Texts"} if section is SOURCE else {"temperature_image_text", "temperature_text_text"}
    figures = {name: value for name, value in last.items() if name.startswith("temperature")}
    assert figures.keys() == names and all(abs(value - 0.1) > 1e-6 for value in figures.values())
    assert figures == {name: value for name, value in last_again.items() if name.startswith("temperature")}
    moved = saved["log_temperature"] != torch.tensor(math.log(0.1))
    assert moved.sum() == 2, "those of no row stay, and no decay pulls them"
    assert any("eval_loss" in line for line in log)


def test_global_is_the_alias_of_learnable_temperature(root, tmp_path):
    new = build(InfoNCE, {"temperature": {"start": 0.1, "learn": "global"}}, "loss.")
    old = InfoNCE(temperature=0.1, learnable_temperature=True)
    for section in (new, old):
        assert section.learns and list(section.function().state_dict()) == ["log_temperature"]
        assert section.figures(section.function()) == {"temperature": pytest.approx(0.1)}
    constant = build(InfoNCE, {"temperature": {"start": 0.07}}, "loss.")
    assert constant.function() is info_nce and constant.options(LossBatch(torch.arange(2), torch.arange(2)))["temperature"] == 0.07


@pytest.mark.parametrize(
    "loss, words",
    [
        ({"temperature": {"learn": "sources"}}, "loss.temperature.learn: expected one of none, global, source, modality, got 'sources'"),
        ({"temperature": {"start": 50.0, "learn": "source"}}, "loss.temperature.start: expected a start within"),
        ({"temperature": {"start": -1.0}}, "loss.temperature: expected"),
        ({"temperature": {"strat": 0.1}}, "unknown recipe key loss.temperature.strat; did you mean loss.temperature.start"),
        ({"temperature": {"learn": "global"}, "learnable_temperature": True}, "is loss.temperature.learn: global"),
        ({"temperature": {"learn": "source"}, "hardness": 5.0}, "loss.hardness: expected 0 beside temperature.learn: source"),
        ({"temperature": {"learn": "modality"}, "hardness": 5.0}, "loss.hardness: expected 0 beside temperature.learn: modality"),
        ({"name": "cosent", "temperature": {"learn": "global"}}, "loss.temperature must be of type float"),
    ],
    ids=str,
)
def test_what_is_refused(root, tmp_path, loss, words):
    with pytest.raises(ValueError, match=words):
        load_recipe(write_recipe(root, output=str(tmp_path / "o"), loss=loss))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plan(root, tmp_path, ranks):
    recipe = load_recipe(write_recipe(root, output=str(tmp_path / "o"), loss=MODALITY))
    plan = simulate(recipe, None, ranks=ranks, make_batch=lambda processing: planned_batch(recipe, processing, ranks))
    assert plan.peak > plan.resident > 0
