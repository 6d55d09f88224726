"""The recipes and mixtures of the project: every file is one, and what a mixture says comes out as VLM2Vec-V2 trains on it."""

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.repository import ROOT
from train.data.sources import open_source
from train.plan.__main__ import main
from train.preflight import needs
from train.recipe.schema import Data, Source, load_recipe, read_mixture
from vlm2vec.checkpoint.pretrained import Description

FOLDER = ROOT / "train" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
PLANNED = [path for path in RECIPES if not path.name.startswith("quickstart")]  # those train what a command makes first


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_one(path):
    recipe = load_recipe(path)
    assert recipe.data.sources and recipe.data.mixture is None


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_what_a_run_counts_before_loading_is_what_the_committed_plan_says(path):
    """Weights, gradients and optimizer of the recipe as it is now; a plan that was not made anew after a change differs."""
    recipe = load_recipe(path)
    plan = (path.parent / "plans" / f"{path.stem}.md").read_text(encoding="utf-8")
    assert f"python -m train plan train/recipes/{path.name} " in plan
    ranks = re.search(r"--ranks (\d+)", plan)
    model = Description(None, None, None, recipe.model, None, {}, {}, {})
    need = needs(recipe, model, int(ranks[1]) if ranks else 1)
    counted = {"weights": need.weights, "gradients": need.gradients, "optimizer": need.optimizer}
    if "paged" in recipe.optimizer:  # the plan has it on the GPU, a run can do without
        del counted["optimizer"]
    rows = dict(re.findall(r"^\| (weights|gradients|optimizer) \| ([\d.]+) \|", plan, re.MULTILINE))  # small ones are not listed
    assert "weights" in rows
    for part, size in counted.items():
        assert part not in rows or size / 2**30 == pytest.approx(float(rows[part]), abs=0.0051), part


def test_a_mixture_is_the_published_one():
    second = read_mixture("mmeb-v2")
    assert sum(source.weight for source in second) == 52 and len(second) == 25
    first = read_mixture("mmeb-v1")
    assert len(first) == 20 and {source.rows for source in first} == {50000}
    with pytest.raises(ValueError, match="did you mean mmeb-v1"):
        Data(root="x", images="y", mixture="mmebv1")
    own = Data(root="x", images="y", mixture="mmeb-v1", sources=[Source("NIGHTS", weight=3.0), Source("Mine")])
    assert [s.weight for s in own.sources if s.name == "NIGHTS"] == [3.0]
    assert own.sources[-1].name == "Mine" and len(own.sources) == 21


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Rows of each format of V2, two of each, in local files."""
    import datasets

    root = tmp_path_factory.mktemp("formats")
    picture = root / "page.png"
    Image.new("RGB", (28, 28), "white").save(picture)
    page = {"bytes": picture.read_bytes(), "path": "page.png"}
    features = {
        "image": datasets.Image(),
        "query": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "source": datasets.Value("string"),
    }
    rows = [
        {"image": page, "query": "How much?", "answer": "['7']", "source": "PlotQA"},
        {"image": page, "query": "Who?", "answer": "b", "source": "new"},
    ]
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(root / "train-00000.parquet")
    for number in range(20):
        (root / "frames" / "v1").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (28, 28)).save(root / "frames" / "v1" / f"c01_{number:04d}.jpeg")
    said = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "A fox runs."}]
    other = [{"from": "human", "value": "Describe it."}, {"from": "gpt", "value": "Hens."}]
    datasets.Dataset.from_list(
        [{"id": "1", "video": "v1", "conversations": said}, {"id": "2", "video": "gone", "conversations": other}]
    ).to_json(root / "clips.jsonl")
    return root


def rows_of(tables, format, **more):
    data = Data(root=str(tables), images=str(tables / "frames"), sources=[Source("s", format=format, split="train", **more)], rows=2)
    return open_source(data, data.sources[0])


def test_pages(tables):
    table = rows_of(tables, "page_question")
    query, target, negatives = table.row(0, 8)
    assert query["text"] == "<|image_1|> How much?" and query["image"].startswith(b"\x89PNG")
    assert (target, negatives) == ({"text": "['7']", "image": None}, [])
    table = rows_of(tables, "visrag")
    query, target, _ = table.row(0, 8)
    assert query["text"].startswith("This query relates to retrieving a relevant plot") and query["text"].endswith(":  How much? ")
    assert target["text"].endswith("or line graphs.  <|image_1|>")
    query, target, _ = table.row(1, 8)
    assert (query["text"], target["text"]) == ("Who? ", " <|image_1|>")


def test_videos(tables):
    clips = {format: rows_of(tables, format, file="clips.jsonl") for format in ("video_to_caption", "caption_to_video", "video_question")}
    query, target, _ = clips["video_to_caption"].row(0, 8)
    assert query["text"] == "<|video_1|>\nWhat happens?" and target["text"] == "A fox runs."
    # Whole numbers of eight even steps through twenty frames, cut and not rounded.
    assert [Path(f).stem[-2:] for f in query["video"]] == ["00", "02", "05", "08", "10", "13", "16", "19"]
    query, target, _ = clips["caption_to_video"].row(0, 8)
    assert query["text"] == "Find a video that contains the following visual content: A fox runs."
    assert target["text"] == "Understand the content of the provided video: <|video_1|>"
    query, _, _ = clips["video_question"].row(0, 8)
    assert query["text"] == "Answer a question based on the content of a video. <|video_1|>\nWhat happens?"
    with pytest.raises(ValueError, match="no frames in"):
        clips["video_question"].row(1, 8)


def test_a_source_of_another_format_is_refused(tables):
    with pytest.raises(ValueError, match="needs column 'conversations'|needs column 'video'"):
        rows_of(tables, "video_question")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_committed_plan_is_what_the_command_prints(monkeypatch, capsys):
    monkeypatch.chdir(FOLDER.parents[1])
    assert main(["train/recipes/bench-100m-lora.yaml", "--gpu", "rtx3090-24"]) == 0
    # Bytes moved, and so times, hang on which operators a release of torch is made of; memory and FLOPs do not.
    times = ("| seconds", "| pairs a second", "| hours", "What dominates")
    printed, committed = (
        [line for line in text.splitlines() if not line.startswith(times)]
        for text in (capsys.readouterr().out, (FOLDER / "plans" / "bench-100m-lora.md").read_text(encoding="utf-8"))
    )
    assert printed == committed and len(printed) > 20
