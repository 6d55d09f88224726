"""Distillation from a teacher's embeddings: the files that `train teach` writes, what a step makes of them, and what is refused."""

import json
import logging
import math
import os

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from contrastive_kernels import distillation_loss
from tests.helpers.tiny_models import qwen2_5_vl
from tests.helpers.tiny_recipe import first_batch, gradients, write_recipe
from train.__main__ import main
from train.build import build_model
from train.data.sources import SourceTable
from train.losses import LossBatch
from train.losses.distillation import distillation
from train.losses.teacher import teacher_vectors
from train.plan.batch import first_batch as planned_batch
from train.plan.simulate import simulate
from train.recipe.schema import load_recipe
from train.run import run
from train.step import ContrastiveStep
from vlm2vec.commands.common import encode_named, read_embeddings, write_embeddings
from vlm2vec.model import VLM2Vec

OPTIONS = {"name": "distillation", "temperature": 0.1, "teacher_temperature": 0.2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    write_recipe(folder)
    qwen2_5_vl(folder / "teacher")
    plain = write_recipe(folder, output=str(folder / "plain"))
    assert main(["teach", str(plain), "--teacher", str(folder / "teacher"), "-o", str(folder / "vectors"), "--device", "cpu"]) == 0
    return folder


def files(folder):
    return {side: str(folder / f"{side}.safetensors") for side in ("query", "target")}


def recipe_of(root, tmp_path, sources=({}, {}), **changes):
    loss = OPTIONS | {"teacher": files(root / "vectors")} | changes.pop("loss", {})
    path = write_recipe(root, output=str(tmp_path / "o"), **{"loss": loss, "dtype": "float64", "chunk_tokens": 400} | changes)
    recipe = yaml.safe_load(path.read_text())
    for source, own in zip(recipe["data"]["sources"], sources):
        source.update(own)
    path.write_text(yaml.safe_dump(recipe))
    return load_recipe(path), path


def test_files_hold_each_rows_vectors(root):
    """Those that the teacher gives to what training feeds, by source and row; equal contents are encoded once."""
    teacher = VLM2Vec.from_pretrained(root / "teacher", device="cpu")
    recipe = load_recipe(write_recipe(root, output=str(root / "plain")))
    from train.data.sources import open_source

    for side, name in enumerate(("query", "target")):
        vectors, keys, about = read_embeddings(files(root / "vectors")[name])
        assert keys == [f"{source}/{row}" for source in ("Pictures", "Texts") for row in range(24)]
        assert about["model"] == str(root / "teacher") and "model_identity" in about
        for source, row in ((0, 3), (1, 23)):
            item = open_source(recipe.data, recipe.data.sources[source]).row(row, None)[side]
            truth = teacher.encode(item, convert_to_tensor=True)
            torch.testing.assert_close(vectors[24 * source + row], truth, rtol=1e-4, atol=1e-5)


def test_rows_of_a_wrong_type_and_names_told_twice(root, tmp_path, monkeypatch, capsys):
    """A row costs itself; two sources of one name would share their keys. Vectors wait off the GPU."""
    right, kept = SourceTable.row, []

    def row(self, index, frames):
        query, target, negatives = right(self, index, frames)
        return ({**query, "text": 7} if index == 3 else query), target, negatives

    def encoded(*args, **options):
        kept.append(options["keep_on"])
        return encode_named(*args, **options)

    monkeypatch.setattr(SourceTable, "row", row)
    monkeypatch.setattr("vlm2vec.commands.common.encode_named", encoded)
    plain = write_recipe(root, output=str(tmp_path / "plain"))
    words = ["--teacher", str(root / "teacher"), "-o", str(tmp_path / "v"), "--device", "cpu"]
    assert main(["teach", str(plain), *words]) == 0
    assert "left out Texts, row 3: " in capsys.readouterr().out and kept == ["cpu", "cpu"]
    for path in files(tmp_path / "v").values():
        keys = read_embeddings(path)[1]
        assert len(keys) == 46 and "Texts/3" not in keys and "Texts/4" in keys
    recipe = yaml.safe_load(plain.read_text())
    recipe["data"]["sources"][1] |= {"name": "Pictures", "split": "other"}
    plain.write_text(yaml.safe_dump(recipe))
    assert main(["teach", str(plain), *words]) == 2
    assert "by which python -m train teach tells them, got 'Pictures' twice" in capsys.readouterr().err


def test_a_step_is_the_divergence_from_the_teacher(root, tmp_path):
    recipe, _ = recipe_of(root, tmp_path)
    model = build_model(recipe).train()
    batch = first_batch(recipe, model, 2)
    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))
    result, _ = step(batch)
    assert gradients(model) and result.loss > 0
    with torch.no_grad():
        sides = [step.media.side(batch[name], range(8), lambda *_: None) for name in ("query", "target")]
        student = [torch.nn.functional.normalize(step.embed(side, list(range(8))), dim=1) for side in sides]
    names = [source.name for source in recipe.data.sources]
    teacher = []
    for side in ("query", "target"):
        vectors, keys, _ = read_embeddings(files(root / "vectors")[side])
        teacher.append(torch.stack([vectors[keys.index(f"{names[source]}/{row}")] for source, row in batch["rows"]]).double())
    logs = [torch.log_softmax(q @ t.T / temperature, 1) for (q, t), temperature in ((teacher, 0.2), (student, 0.1))]
    truth = (logs[0].exp() * (logs[0] - logs[1])).sum(1).mean()
    assert result.loss.item() == pytest.approx(truth.item(), rel=1e-5)


def test_unknown_and_unreadable_rows_are_left_out():
    """Of rows and columns: the loss is that of the others alone."""
    generator = torch.Generator().manual_seed(0)
    query, target, tq, tt = (torch.randn(6, width, generator=generator, dtype=torch.float64) for width in (4, 4, 7, 7))
    known, readable = torch.tensor([True] * 5 + [False]), torch.tensor([True, False, True, True, True, True])
    options = {"temperature": 0.5, "teacher_temperature": 0.5, "known": known, "query_mask": readable, "target_mask": readable}
    loss = distillation(query, target, teacher_query=tq, teacher_target=tt, **options)
    kept = [x[known & readable] for x in (query, target, tq, tt)]
    truth = distillation_loss(*kept, temperature=0.5, teacher_temperature=0.5, normalize=True)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-12)
    for x in (query, target, tq, tt):
        x[1], x[5] = 7.0, -3.0
    assert distillation(query, target, teacher_query=tq, teacher_target=tt, **options).item() == pytest.approx(loss.item(), rel=1e-12)


def lacking(root, folder, places):
    """Files of teacher's vectors without those at `places` of the target's."""
    vectors, keys, _ = read_embeddings(files(root / "vectors")["target"])
    left = [place for place in range(len(keys)) if place not in places]
    write_embeddings(str(folder / "few.safetensors"), vectors[left], [keys[place] for place in left], {})
    return files(root / "vectors") | {"target": str(folder / "few.safetensors")}


def test_sources_whose_rows_mostly_lack_vectors_are_refused_before_the_run(root, tmp_path, capsys):
    _, path = recipe_of(root, tmp_path, loss={"teacher": lacking(root, tmp_path, range(24, 37))})
    assert main([str(path)]) == 2
    words = "few.safetensors: expected a vector for row 0 of Texts (key 'Texts/0'), got none, as for 13 of 24 rows; make the files anew"
    assert words in capsys.readouterr().err
    _, path = recipe_of(root, tmp_path, loss={"teacher": lacking(root, tmp_path, [24])})
    assert main([str(path), "--data.strict"]) == 2
    assert "row 0 of Texts (key 'Texts/0'), got none, as for 1 of 24 rows" in capsys.readouterr().err
    _, path = recipe_of(root, tmp_path, loss={"teacher": {"query": "nothing.safetensors", "target": "x"}})
    assert main([str(path)]) == 2
    assert "teacher: nothing.safetensors: no such file" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_row_without_a_vector_is_an_unknown_one(root, tmp_path, caplog):
    """It counts as a row of a source that is not distilled; the first is told, all are counted."""
    recipe, _ = recipe_of(root, tmp_path, loss={"teacher": lacking(root, tmp_path, range(24, 35))})
    few, _ = recipe_of(root, tmp_path)
    batch = LossBatch(torch.arange(4), torch.arange(4), places=[(0, 1), (1, 2), (1, 3), (1, 20)], counted=np.array([1, 1, 0, 1], bool))
    with caplog.at_level(logging.WARNING, logger="train.losses.distillation"):
        options, whole = recipe.objective.options(batch), few.objective.options(batch)
        assert recipe.objective.figures(None)["untaught"] == 1, "a row that cannot be read is counted elsewhere"
        recipe.objective.options(batch)
    assert len(caplog.records) == 1 and "row 2 of Texts (key 'Texts/2'), got none" in caplog.records[0].getMessage()
    assert recipe.objective.figures(None)["untaught"] == 2 and "untaught" not in few.objective.figures(None)
    assert options["known"].tolist() == [True, False, False, True] and whole["known"].all()
    for side in ("teacher_query", "teacher_target"):
        assert torch.equal(options[side], whole[side] * options["known"][:, None])
    recipe.objective.strict = True
    with pytest.raises(ValueError, match="row 2 of Texts .*data.strict"):
        recipe.objective.options(batch)


def test_nothing_is_asked_of_the_device(root, tmp_path):
    """Tensors without numbers stand for those of a GPU, which a question would wait for."""
    recipe, _ = recipe_of(root, tmp_path, ({"loss": {"temperature": 0.1}}, {}), loss={"teacher": lacking(root, tmp_path, [30])})
    numbers = torch.empty(3, dtype=torch.int64, device="meta")
    batch = LossBatch(numbers, numbers, sources=numbers, places=[(0, 1), (1, 2), (1, 6)], counted=np.ones(3, bool))
    options = recipe.objective.options(batch)["parts"][1]
    assert all(options[name].is_meta for name in ("known", "teacher_query", "teacher_target"))
    assert recipe.objective.parts[1].loss.untaught == 1


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_run_with_unreadable_rows_goes_on(tmp_path, damage, caplog):
    """Of held-out rows as of those trained on; the teacher left out what cannot be read."""
    write_recipe(tmp_path)
    for row in (5, 23):
        path = tmp_path / "images" / f"{row}.jpg"
        path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:700])
    qwen2_5_vl(tmp_path / "teacher")
    plain = write_recipe(tmp_path, output=str(tmp_path / "plain"))
    assert main(["teach", str(plain), "--teacher", str(tmp_path / "teacher"), "-o", str(tmp_path / "vectors"), "--device", "cpu"]) == 0
    assert {"Pictures/5", "Pictures/23"}.isdisjoint(read_embeddings(files(tmp_path / "vectors")["query"])[1])
    loss = OPTIONS | {"teacher": files(tmp_path / "vectors")}
    changes = {"steps": 6, "global_batch": 8, "held_out": {"rows": 2, "steps": 3}, "loss": loss}
    with caplog.at_level(logging.WARNING):
        assert run([str(write_recipe(tmp_path, output=str(tmp_path / "o"), **changes))]) == 0
    assert any("Pictures, row 5" in record.getMessage() for record in caplog.records), "the run came by it"
    log = json.loads((tmp_path / "o" / "trainer_state.json").read_text())["log_history"]
    assert all(math.isfinite(line["loss"]) for line in log if "loss" in line) and any(line.get("eval_loss", 0) > 0 for line in log)


def test_rows_by_their_number_alone_where_there_is_one_source(tmp_path):
    """The keys that `vlm2vec embed` gives to the lines of a JSONL."""
    path = str(tmp_path / "v.safetensors")
    write_embeddings(path, torch.tensor([[3.0, 4.0], [0.0, 2.0]]), ["1", "0"], {})
    one = teacher_vectors(path, ["Texts"])
    places = one.places([(0, 0), (0, 1), (0, 5)])
    assert places.tolist() == [1, 0, -1]
    assert one.read(places).tolist() == [[0.0, 1.0], [pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]
    assert not one.read(places[2:]).any()
    assert teacher_vectors(path, ["A", "B"]).places([(1, 1)]).tolist() == [-1]


def test_files_of_many_teachers_stay_open_and_are_mapped(tmp_path):
    paths = [str(tmp_path / f"{at}.safetensors") for at in range(12)]
    for at, path in enumerate(paths):
        write_embeddings(path, torch.full((2, 3), at + 1.0), ["0", "1"], {})
    opened = [teacher_vectors(path, ["Texts"]) for path in paths]
    assert all(teacher_vectors(path, ["Texts"]) is one for path, one in zip(paths, opened))
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            told = maps.read()
        assert all(os.path.realpath(path) in told for path in paths), "read by row, not held whole"
    write_embeddings(paths[0], torch.tensor([[0.0, 2.0]]), ["1"], {})
    os.utime(paths[0], ns=(1, 1))
    assert teacher_vectors(paths[0], ["Texts"]).places([(0, 0), (0, 1)]).tolist() == [-1, 0], "a new file is read anew"


def test_a_run_beside_another_loss_with_held_out_rows(root, tmp_path):
    changes = {"loss": [OPTIONS | {"teacher": files(root / "vectors"), "symmetric": True}, {"temperature": 0.1, "weight": 0.5}]}
    path = write_recipe(root, output=str(tmp_path / "o"), held_out={"rows": 2, "steps": 2}, **changes)
    assert run([str(path)]) == 0
    log = json.loads((tmp_path / "o" / "trainer_state.json").read_text())["log_history"]
    line = next(entry for entry in log if "loss" in entry)
    assert line["loss"] == pytest.approx(line["loss_distillation"] + 0.5 * line["loss_info_nce"], rel=1e-3)
    assert any(entry.get("eval_loss", 0) > 0 for entry in log)
    with safe_open(tmp_path / "o" / "model.safetensors", "pt") as saved:
        assert not any("loss" in name for name in saved.keys())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plan_needs_no_files(root, tmp_path, ranks):
    teacher = {"teacher": {"query": "elsewhere.safetensors", "target": "elsewhere.safetensors"}, "symmetric": True}
    recipe, _ = recipe_of(root, tmp_path, loss=teacher)
    plan = simulate(recipe, None, ranks=ranks, make_batch=lambda processing: planned_batch(recipe, processing, ranks))
    assert plan.peak > plan.resident > 0


def test_only_the_sources_that_are_distilled_need_vectors(root, tmp_path):
    vectors, keys, about = read_embeddings(files(root / "vectors")["query"])
    for side in ("query", "target"):
        vectors, keys, _ = read_embeddings(files(root / "vectors")[side])
        write_embeddings(str(tmp_path / f"{side}.safetensors"), vectors[24:], keys[24:], {})
    recipe, _ = recipe_of(root, tmp_path, ({"loss": {"temperature": 0.1}}, {}), loss={"teacher": files(tmp_path)})
    model = build_model(recipe).train()
    result, _ = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))(first_batch(recipe, model, 2))
    assert result.loss.isfinite() and list(result.stats.losses) == ["info_nce", "distillation"]
    section = recipe.objective.parts[1].loss
    options = section.options(LossBatch(torch.arange(2), torch.arange(2), rows=torch.tensor([False, True]), places=[(0, 0), (1, 0)]))
    assert not options["teacher_query"][0].any() and options["teacher_query"][1].any()
