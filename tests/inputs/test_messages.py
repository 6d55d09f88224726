"""What is said when something is amiss: the thing itself, its old and new value, and the way on; and nothing that leads astray."""

import json
import logging
import re
from pathlib import Path

import pytest

from tests.helpers.evaluation_layouts import StubModel
from tests.helpers.tiny_recipe import write_recipe
from train.data.sources import open_source
from train.recipe.schema import Data, Source
from train.run import run
from vlm2vec.checkpoint.loading import check_source
from vlm2vec.commands.notices import ASTRAY, keep_back
from vlm2vec.data.mmeb import read_train, write_eval
from vlm2vec.evaluation.report.summary import markdown, not_as_published, terminal
from vlm2vec.evaluation.runner import Options, run_tasks
from vlm2vec.evaluation.score.aggregate import aggregate
from vlm2vec.evaluation.tasks import find_tasks, make_task

# -- other libraries' notices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logger", "message", "kept"),
    [
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: no", False),
        ("bitsandbytes.backends.cpu.ops", "something else", True),
        ("huggingface_hub.utils._http", "Retrying in 1s [Retry 1/5].", False),
        ("huggingface_hub.utils._http", "'(MaxRetryError)' thrown while requesting HEAD https://huggingface.co/a/b", False),
        ("huggingface_hub.utils._http", "the token is wrong", True),
    ],
)
def test_notices_that_lead_astray_are_kept_back(logger, message, kept):
    keep_back()
    keep_back()  # once is enough
    record = logging.LogRecord(logger, logging.WARNING, "", 0, "%s", (message,), None)
    assert bool(logging.getLogger(logger).filter(record)) is kept
    assert len([known for known in logging.getLogger(logger).filters if type(known).__name__ == "_Without"]) == 1
    assert set(ASTRAY) == {"bitsandbytes.backends.cpu.ops", "huggingface_hub.utils._http"}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("quickstart/modle", "quickstart/modle: no such folder, did you mean quickstart/model; give a model folder"),
        ("quickstart/other", "quickstart/other: no such folder; give a model folder or a hub name"),
        ("./modle", "./modle: no such folder; give"),
        ("quickstart", "neither config.json nor adapter_config.json"),
    ],
)
def test_a_mistyped_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    Path("quickstart/model").mkdir(parents=True)
    with pytest.raises(ValueError, match=re.escape(said)):
        check_source(source)


def test_a_hub_name_is_left_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_source("Qwen/Qwen2-VL-2B-Instruct")


# -- training data -----------------------------------------------------------------------------------------------------


def test_a_folder_without_data_sets_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"found none; .* holds no folder with a parquet file in it; write_train makes one"):
        read_train(tmp_path, "Shop")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n", "root captions.csv is a file; give the folder that holds Shop/original-*.parquet"),
        (None, "no such file or folder as captions.csv; mend `root`"),
    ],
)
def test_a_csv_has_nothing_to_do_with_the_network(tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("captions.csv").write_text(content)
    source = Source("Shop")
    with pytest.raises(ValueError, match=re.escape(said)):
        open_source(Data(root="captions.csv", images=".", sources=[source]), source)


def test_a_local_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"video": \n')
    source = Source("Shop", format="video_to_caption", file="rows.jsonl")
    with pytest.raises(ValueError, match="rows.jsonl cannot be read as json") as caught:
        open_source(Data(root=str(tmp_path), images=".", sources=[source]), source)
    assert "network" not in str(caught.value) and len(str(caught.value)) < 500


# -- going on with a run -----------------------------------------------------------------------------------------------


def test_a_finished_run_goes_on_for_more_steps(tmp_path, capsys):
    output = tmp_path / "run"
    recipe = str(write_recipe(tmp_path, output=str(output), steps=2, save_steps=1))
    assert run([recipe]) == 0 and run([recipe, "--steps", "4"]) == 0
    told = capsys.readouterr().out.replace("\n", " ")
    assert "checkpoint-2 with other steps" in told and "trained 4 steps" in told
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 4
    assert run([recipe, "--steps", "4"]) == 0 and "is already trained by this recipe" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds a model trained with other steps \(4, now 3\); go on from its weights with --model .*run"):
        run([recipe, "--steps", "3"])


def test_a_refused_resumption_says_both_values_and_the_way_on(tmp_path):
    output = tmp_path / "run"
    recipe = str(write_recipe(tmp_path, output=str(output), steps=2, save_steps=1))
    assert run([recipe]) == 0
    with pytest.raises(ValueError) as caught:
        run([recipe, "--seed", "8", "--loss.temperature", "0.5"])
    said = str(caught.value)
    assert re.search(r"other .*seed \(\d+, now 8\)", said) and "loss.temperature (0.02, now 0.5)" in said
    assert f"--model {output} --output NEW, choose another output, or pass --fresh" in said and len(said) < 500 + 3 * len(str(output))
    # the way on is one: the old run's weights, under the new recipe
    assert run([recipe, "--seed", "8", "--model", str(output), "--output", str(tmp_path / "new"), "--steps", "1"]) == 0


# -- rows of an evaluation ---------------------------------------------------------------------------------------------


def evaluated(tmp_path, rows, name="Shop"):
    folder = tmp_path / "data" / name
    folder.mkdir(parents=True)
    (folder / "test-0.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = find_tasks(tmp_path / "data", None, {})
    return run_tasks(StubModel(), tasks, tmp_path / "data", tmp_path, tmp_path / "scores", options=Options(progress=False))


GOOD = {"qry_text": "good", "qry_img_path": "", "tgt_text": ["good", "other"], "tgt_img_path": ["", ""]}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"qry_text": None}, "row 2: neither query text nor query image"),
        ({"qry_text": "  ", "qry_img_path": "  "}, "row 2: neither query text nor query image"),
        ({"tgt_text": ["a", "b", "c"]}, "row 2: 3 tgt_text but 2 tgt_img_path entries"),
        ({"tgt_text": None}, "row 2: tgt_text and tgt_img_path are lists, one entry per candidate"),
    ],
)
def test_one_bad_row_is_told_counted_and_wrong_and_the_run_goes_on(tmp_path, capsys, bad, said):
    (row,) = evaluated(tmp_path, [GOOD, GOOD, {**GOOD, **bad}, GOOD])
    assert row["num_queries"] == 4 and row["metrics"]["hit@1"] <= 0.75
    assert row["problems"]["affected_rows"] == 1 and row["problems"]["unreadable_query"] == {"rows": 1, "examples": [said]}
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "blank", [{"qry_img_path": None}, {"qry_img_path": " "}, {"tgt_img_path": [None, " "]}, {"tgt_img_path": [" ", None]}]
)
def test_blank_paths_are_no_pictures(tmp_path, blank):
    (row,) = evaluated(tmp_path, [GOOD, {**GOOD, **blank}])
    assert row["problems"] == {}, "null and blanks are an absent side"


def test_mostly_bad_rows_end_the_task(tmp_path):
    with pytest.raises(ValueError, match="task Shop, row 0: neither query text nor query image; 2 of 3 rows cannot"):
        evaluated(tmp_path, [{**GOOD, "qry_text": ""}, {**GOOD, "qry_text": None}, GOOD])


def test_a_null_candidate_is_told(tmp_path):
    (row,) = evaluated(tmp_path, [GOOD, {**GOOD, "tgt_text": ["good", None]}])
    assert row["problems"]["unreadable_candidate"]["examples"] == ["row 1, candidate 1 is empty"]


def test_a_query_without_words_of_other_tasks_is_told(tmp_path):
    folder = tmp_path / "data" / "Films"
    folder.mkdir(parents=True)
    rows = [{"v": "a", "t": None}, {"v": "a", "t": "a fox"}, {"v": "a", "t": []}]
    (folder / "test.jsonl").write_text("\n".join(json.dumps({**row, "t": row["t"]}) for row in rows[:2]))
    task = make_task(
        {
            "name": "Films",
            "modality": "video",
            "loader": "video_retrieval",
            "candidates": "global",
            "query_prompt": "Find: {text}",
            "target_prompt": "<|video_1|>",
            "options": {"video": "v", "text": "t"},
        },
        "test",
    )
    from vlm2vec.evaluation.loaders import load_task

    data = load_task(task, tmp_path / "data", tmp_path)
    assert data.queries == [{"text": "", "image": None, "unreadable": "row 0: no t", "row": True}, {"text": "Find: a fox"}]


# -- a toy task with a published name ----------------------------------------------------------------------------------


def test_a_toy_task_with_a_published_name_is_told(tmp_path):
    rows = [{"qry_text": f"q {i}", "qry_img_path": "", "tgt_text": [f"q {i}", "x"], "tgt_img_path": ["", ""]} for i in range(4)]
    for name in ("GQA", "Shop"):
        write_eval(tmp_path / "data", name, rows)
    tasks = find_tasks(tmp_path / "data", None, {})
    summaries = run_tasks(StubModel(), tasks, tmp_path / "data", tmp_path, tmp_path / "scores", options=Options(progress=False))
    said = "GQA has 4 queries here, 1,000 as published: its scores cannot be compared"
    assert not_as_published(summaries) == [said] and said in terminal(summaries, aggregate(summaries))
    lines = markdown(summaries, aggregate(summaries), "model")
    assert f"* {said}" in lines
    assert not_as_published([{**summaries[0], "task": "GQA", "num_queries": 1000}]) == []
