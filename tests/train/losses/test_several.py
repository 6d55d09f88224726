"""Sums of losses, and losses of a source's own: what a step makes of them, what is logged, held out and planned."""

import json

import numpy as np
import pytest
import torch
import yaml

from contrastive_kernels import info_nce, sigmoid_loss
from tests.helpers.tiny_recipe import first_batch, gradients, write_recipe
from train.build import build_model
from train.data.rows import PairDataset
from train.losses.several import Several
from train.plan.batch import first_batch as planned_batch
from train.plan.fake.gradcache import loss_of_ranks
from train.plan.simulate import simulate
from train.recipe.schema import load_recipe
from train.run import run
from train.step import ContrastiveStep
from vlm2vec.data.mmeb import read_train, write_train

INFO, SIGMOID = {"name": "info_nce", "temperature": 0.1}, {"name": "sigmoid_loss", "scale": 5.0, "bias": -3.0, "weight": 0.5}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The tiny recipe's data with a column of grades in Texts, and of scores in Pictures, whose rows have a negative each."""
    folder = tmp_path_factory.mktemp("several")
    write_recipe(folder)
    for name, column in (("Texts", "grade"), ("Pictures", "teacher")):
        rows = read_train(folder / "train", name).to_list()
        for at, row in enumerate(rows):
            row[column] = float(at % 4) if column == "grade" else [2.0 + at % 3, float(at % 2)]
        write_train(folder / "train", name, rows)
    return folder


def recipe_of(root, tmp_path, sources=({}, {}), data=None, **changes):
    path = write_recipe(root, output=str(tmp_path / "o"), **{"dtype": "float64", "global_batch": 8, "interleave_batch_size": 4} | changes)
    recipe = yaml.safe_load(path.read_text())
    for source, own in zip(recipe["data"]["sources"], sources):
        source.update(own)
    recipe["data"].update(data or {})
    path.write_text(yaml.safe_dump(recipe))
    return load_recipe(path), path


def stepped(recipe, model, batch):
    model.zero_grad()
    loss = recipe.objective.function()
    loss = loss.double() if isinstance(loss, torch.nn.Module) else loss
    result, _ = ContrastiveStep(recipe, model, model, device=torch.device("cpu"), loss=loss)(batch)
    return result, gradients(model)


def mixed(recipe, model):
    """A batch with rows of both sources."""
    batches = [first_batch(recipe, model, step) for step in range(4)]
    return next(b for b in batches if {source for source, _ in b["rows"]} == {0, 1})


def test_one_section_is_the_loss_itself(root, tmp_path):
    for loss in (INFO, [INFO]):
        recipe, _ = recipe_of(root, tmp_path, loss=loss)
        assert recipe.objective.name == "info_nce" and recipe.objective.function() is info_nce
    own, _ = recipe_of(root, tmp_path, loss=INFO, sources=({"loss": INFO}, {}))
    assert not isinstance(own.objective, Several), "what says the same is the same"


def test_a_sum_is_the_weighted_sum_of_its_sections_gradients_too(root, tmp_path):
    both, _ = recipe_of(root, tmp_path, loss=[INFO, SIGMOID])
    model = build_model(both).train()
    batch = mixed(both, model)
    result, found = stepped(both, model, batch)
    alone = []
    for section in (INFO, {**SIGMOID, "weight": 1.0}):
        recipe, _ = recipe_of(root, tmp_path, loss=section)
        alone.append(stepped(recipe, model, batch))
    assert result.loss.item() == pytest.approx(alone[0][0].loss.item() + 0.5 * alone[1][0].loss.item(), rel=1e-12)
    for name, gradient in found.items():  # the model's norms round what passes them to float32: 6e-8 of the largest
        truth = alone[0][1][name] + 0.5 * alone[1][1][name]
        torch.testing.assert_close(gradient, truth, rtol=0, atol=2e-7 * float(truth.abs().max()))
    told = {label: float(loss) for label, (loss, _) in result.stats.losses.items()}
    assert told == pytest.approx({"info_nce": alone[0][0].loss.item(), "sigmoid_loss": alone[1][0].loss.item()}, rel=1e-12)


def test_rows_of_a_source_with_its_own_loss_count_there_and_stay_candidates_elsewhere(root, tmp_path):
    recipe, _ = recipe_of(root, tmp_path, loss=INFO, sources=({}, {"loss": [{"temperature": 0.5}, SIGMOID]}))
    model = build_model(recipe).train()
    batch = mixed(recipe, model)
    result, _ = stepped(recipe, model, batch)
    sources = torch.tensor([source for source, _ in batch["rows"]])
    ids = {name: torch.from_numpy(batch[name]) for name in ("query_ids", "target_ids")}
    query, target = embedded(recipe, model, batch)
    truth = 0.0
    for rows, temperature in ((sources == 0, 0.1), (sources == 1, 0.5)):
        places = torch.where(rows, torch.arange(8), -100)
        loss = info_nce(query, target, temperature=temperature, normalize=True, positives=places, target_query_ids=ids["query_ids"], **ids)
        truth += float(rows.double().mean() * loss)
    places = torch.where(sources == 1, torch.arange(8), -100)
    options = {"scale": 5.0, "bias": -3.0, "normalize": True, "target_ids": ids["target_ids"], "positives": places}
    truth += 0.5 * float((sources == 1).double().mean() * sigmoid_loss(query, target, **options))
    assert result.loss.item() == pytest.approx(truth, rel=1e-6)
    assert list(result.stats.losses) == ["info_nce", "info_nce_Texts", "sigmoid_loss"]


def embedded(recipe, model, batch):
    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))
    with torch.no_grad():
        sides = [step.media.side(batch[name], range(8), lambda *_: None) for name in ("query", "target")]
        return [step.embed(side, list(range(8))) for side in sides]


def test_the_loss_of_the_recipe_said_once_more_by_a_source_changes_nothing(root, tmp_path):
    recipe, _ = recipe_of(root, tmp_path, loss=INFO)
    model = build_model(recipe).train()
    batch = mixed(recipe, model)
    result, found = stepped(recipe, model, batch)
    split, _ = recipe_of(root, tmp_path, loss=INFO, sources=({"loss": INFO | {"workspace_mib": 100.0}}, {}))
    assert isinstance(split.objective, Several)
    again, found_again = stepped(split, model, batch)
    assert again.loss.item() == pytest.approx(result.loss.item(), rel=1e-12)
    for name, gradient in found.items():
        torch.testing.assert_close(found_again[name], gradient, rtol=1e-9, atol=1e-12)


def test_own_negatives_only_leaves_the_batch_out(root, tmp_path):
    """Labels of a classification: the loss of a row is that of its positive and its own wrong label."""
    recipe, _ = recipe_of(root, tmp_path, loss=INFO | {"own_negatives_only": True}, data={"hard_negatives": True})
    model = build_model(recipe).train()
    batch = mixed(recipe, model)
    result, _ = stepped(recipe, model, batch)
    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))
    with torch.no_grad():
        sides = [step.media.side(batch[name], range(8), lambda *_: None) for name in ("query", "target", "negatives")]
        query, target, hard = (torch.nn.functional.normalize(step.embed(s, list(range(len(s)))), dim=1) for s in sides)
    losses = []
    for row in range(8):
        own = hard[batch["hard_offsets"][row] : batch["hard_offsets"][row + 1]]
        logits = torch.cat([target[row : row + 1], own]) @ query[row] / 0.1
        losses.append(float(logits.logsumexp(0) - logits[0]))
    assert result.loss.item() == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize(
    "loss, sources, data, words",
    [
        ([], ({}, {}), {}, "loss lists no section"),
        ([INFO, {"name": "cosnet"}], ({}, {}), {}, r"loss\[1\].name 'cosnet' is unknown; did you mean cosent"),
        ([INFO, {"temprature": 1}], ({}, {}), {}, r"unknown recipe key loss\[1\].temprature"),
        ([INFO, {"hardness": -1}], ({}, {}), {}, r"loss\[1\].hardness must be 0 or more"),
        (INFO, ({}, {"loss": {"temperature": -1}}), {}, r"data.sources\[1\].loss.temperature: expected"),
        ([INFO, SIGMOID | {"weight": 0}], ({}, {}), {}, r"loss\[1\].weight must be above 0"),
        ({"name": "cosent"}, ({"grade": "grade"}, {}), {}, "source Texts: loss cosent needs the column that holds its grade"),
        ({"name": "score_distillation"}, ({"scores": "t"}, {"scores": "t"}), {}, "say data.hard_negatives: true"),
        (INFO | {"own_negatives_only": True}, ({}, {}), {}, "loss.own_negatives_only: expected data.hard_negatives: true"),
        ({"name": "distillation"}, ({}, {}), {}, "loss.teacher: expected {query: FILE, target: FILE}"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_its_place(root, tmp_path, loss, sources, data, words):
    with pytest.raises(ValueError, match=words):
        recipe_of(root, tmp_path, loss=loss, sources=sources, data=data)


GRADED = {"loss": [{"name": "cosent", "temperature": 0.1}, INFO], "grade": "grade"}
SCORED = {"loss": {"name": "score_distillation", "temperature": 0.1}, "scores": "teacher"}


def test_a_run_with_grades_and_scores_logs_each_section_and_scores_held_out_rows(root, tmp_path):
    changes = {"held_out": {"rows": 2, "steps": 3}, "steps": 6, "learning_rate": 3e-3}
    recipe, path = recipe_of(root, tmp_path, sources=(SCORED, GRADED), data={"hard_negatives": True}, **changes)
    assert run([str(path)]) == 0
    log = json.loads((tmp_path / "o" / "trainer_state.json").read_text())["log_history"]
    lines = [entry for entry in log if "loss" in entry]
    labels = {"loss_score_distillation", "loss_cosent", "loss_info_nce"}
    assert labels <= {name for line in lines for name in line} and all(line["loss"] > 0 for line in lines)
    for line in lines:  # in a step whose rows are all of one source the other's sections are not logged
        assert {"loss_score_distillation"} & line.keys() or {"loss_cosent", "loss_info_nce"} <= line.keys()
    assert "temperature_cosent" in lines[0]
    held = [entry for entry in log if "eval_loss" in entry]
    assert held and all(np.isfinite(entry["eval_loss"]) for entry in held)
    assert "a sum of losses: score_distillation, cosent, info_nce" in (tmp_path / "o" / "README.md").read_text()
    assert run([str(path)]) == 0, "the recipe that was written out is the same recipe"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plan_of_a_sum(root, tmp_path, ranks):
    recipe, _ = recipe_of(root, tmp_path, sources=(SCORED, GRADED), data={"hard_negatives": True})
    plan = simulate(recipe, None, ranks=ranks, make_batch=lambda processing: planned_batch(recipe, processing, ranks))
    assert plan.peak > plan.resident > 0 and plan.cost.flops > 0


def test_labels_that_do_not_fit_cost_their_row(root, tmp_path):
    recipe, _ = recipe_of(root, tmp_path, sources=(SCORED, GRADED), data={"hard_negatives": True})
    data = PairDataset(recipe.data, build_model(recipe).processing)
    good = data[0, 1]
    assert good["scores"] == [3.0, 1.0] and good["pair"] == 3 and data[1, 5]["grade"] == 1.0 and data[1, 5]["pair"] == 0
    for table, wrong, words in (
        (0, {"teacher": [1.0]}, "expected 2 scores, the positive's first and one a hard negative, got 1 of them"),
        (0, {"teacher": [1.0, float("nan")]}, "expected a finite number, got nan"),
        (1, {"grade": None}, "expected a finite number, got None"),
    ):
        data.tables[table]._labels = {1: wrong}
        assert words in data[table, 1]["error"]
    del recipe.data.sources[1].loss
    with pytest.raises(ValueError, match="source Pictures: scores names column 'techer', the data has qry"):
        recipe.data.sources[0].scores = "techer"
        PairDataset(recipe.data, None)


def test_a_plan_over_ranks_leaves_the_options_of_a_sum_as_they_are():
    """They are a step's, which a plan takes more than once."""
    ids, seen = torch.arange(3), []
    parts = [{"target_ids": ids}, {"positives": ids}]
    loss = loss_of_ranks(lambda query, target, **options: seen.append((len(target), options["parts"])), 2)
    for _ in range(2):
        loss(torch.ones(3, 2), torch.ones(3, 2), parts=parts)
    assert parts == [{"target_ids": ids}, {"positives": ids}] and parts[0]["target_ids"] is ids
    assert [(count, given[0]["target_ids"].tolist()) for count, given in seen] == [(6, [0, 1, 2, 0, 1, 2])] * 2
