"""`vlm2vec data preview`: rows as the model is fed them, counts of what cannot be read, a page of pictures; and `eval` of held-out rows."""

import json
import shutil

import pytest
import yaml

from tests.helpers.command_line import assert_refused, assert_runs
from tests.helpers.film_files import shade, write_film
from tests.helpers.own_data import rows, source, write_pictures
from tests.helpers.tiny_models import BUILDERS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("preview")
    (root / "model").mkdir()
    BUILDERS["qwen2_vl"](root / "model")
    write_pictures(root / "pictures")
    (root / "pictures" / "006.jpg").write_bytes((root / "pictures" / "007.jpg").read_bytes()[:700])  # whole header, cut behind it
    return root


def write(folder, place, *sources, **changes):
    recipe = {"model": str(place / "model"), "output": str(folder / "out"), "data": {"sources": list(sources), "hard_negatives": True}}
    recipe |= {"steps": 4, "global_batch": 8, "chunk_tokens": 200, "cpu": True, "held_out": {"rows": 2, "steps": 2}} | changes
    (folder / "shop.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "shop.yaml"


def test_rows_as_the_model_sees_them(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = rows()
    told = [source(form, tmp_path / form, place / "pictures", content) | {"name": form} for form in ("CSV", "WebDataset")]
    path = write(tmp_path, place, *told)
    out, _ = assert_runs(capsys, ["data", "preview", path])
    for name in ("CSV", "WebDataset"):
        assert f"{name}: {told[name == 'WebDataset']['path']}, 24 rows in 12 groups; 22 to train on, 2 held out" in out
    assert 'query       24 tokens  "Find: a red shoe, "left""' in out
    assert 'target      16 tokens  "<|image_pad|> x 6\\nShow it.\\n"' in out, "84 x 56 pixels are 3 x 2 tokens"
    assert f"{place}/pictures/000.jpg: 84 x 56 pixels as 84 x 56" in out, "turned by its EXIF orientation"
    assert f"{place}/pictures/002.jpg: 61 x 140 pixels as 56 x 140" in out
    assert out.count("3 of 24 rows cannot be read:") == 2
    assert "CSV, row 3: image" in out and "CSV, row 5: query: empty, in 'caption'" in out and "WebDataset, row 4: target: empty" in out
    assert "note: `vlm2vec search` and `index` say 'Find me an everyday image" in out
    page = (tmp_path / "shop-preview.html").read_text()
    assert page.count('<img alt="') >= 2 * 20 * 3 and "data:image/jpeg;base64," in page and "Find: a red shoe" in page
    assert "http" not in page.replace("https://x", ""), "nothing from elsewhere"
    assert "3 of 24 rows cannot be read" in page
    out, _ = assert_runs(capsys, ["data", "preview", path, "--decode", "--no-html", "--rows", "1", "--chunk_tokens", "20"])
    assert "6 of 24 rows cannot be read:" in out, "the cut picture is a negative of two more rows"
    assert "row 6: image" in out and "truncated" in out
    assert "the longest is above chunk_tokens (20): say chunk_tokens: 28 or more" in out and "page:" not in out
    assert out.count("  row 0\n") == 2 and "  row 1\n" not in out


def test_films_and_lines_that_are_no_rows(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_film(tmp_path / "clip.mp4", [shade(n, (56, 56)) for n in range(8)])
    (tmp_path / "clips.csv").write_text("clip,said\nclip.mp4,a film\nclip.mp4\ngone.mp4,none\n")
    told = {"name": "clips", "path": "clips.csv", "query": "said", "target": {"text": "<|video_1|> Describe it.", "video": "clip"}}
    out, _ = assert_runs(capsys, ["data", "preview", write(tmp_path, place, told, model_options={"frames": 4})])
    assert f"{tmp_path}/clip.mp4: 4 frames of 56 x 56 pixels" in out and "<|video_pad|> x" in out
    assert "1 of 2 rows cannot be read:" in out and "video" in out and "gone.mp4: no such file" in out
    assert "1 lines are no rows and left out:" in out and "clips.csv, line 3: 1 cells, expected the 2" in out
    assert "data:image/jpeg" in (tmp_path / "shop-preview.html").read_text()


def test_what_cannot_be_shown_is_refused(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("caption,file\nx,gone.jpg\n")
    path = write(tmp_path, place, {"name": "shop", "path": "rows.csv", "query": "caption", "target": {"image": "file"}})
    assert_refused(capsys, ["data", "preview", path, "--no-html"], "none of its 1 rows can be read", "gone.jpg")
    assert_refused(capsys, ["data", "preview", path, "--rows", "-1"], "--rows must be 0 or more")
    assert_refused(capsys, ["data", "show", path], "expected preview")
    assert_refused(capsys, ["data", "preview", "gone.yaml"], "recipe gone.yaml is not a file")
    assert_refused(capsys, ["data", "preview", path, "--html", "no/where.html"], "choose a folder that is there")


def test_held_out_rows_are_evaluated_whatever_they_lie_in(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = [row | {"product": f"p{i}"} for i, row in enumerate(rows(60))]
    content[-1]["caption"] = ""  # held out, and cannot be read
    content[-2]["caption"] = content[-3]["caption"] = "twice"
    write_pictures(tmp_path / "pictures", 60)
    (tmp_path / "pictures" / "056.jpg").write_bytes((tmp_path / "pictures" / "055.jpg").read_bytes())
    told = [source(form, tmp_path / form, tmp_path / "pictures", content) | {"name": form} for form in ("CSV", "WebDataset")]
    path = write(tmp_path, place, *told, held_out={"rows": 5, "steps": 2})
    out, _ = assert_runs(
        capsys, ["eval", place / "model", "--data", path, "--output", tmp_path / "scores", "--device", "cpu", "--no-report"]
    )
    summaries = [json.loads((tmp_path / f"scores/tasks/{one['name']}.json").read_text()) for one in told]
    assert summaries[0]["metrics"] == summaries[1]["metrics"], "the same rows score the same out of any form"
    assert [(s["num_queries"], s["num_candidates"]) for s in summaries] == [(5, 3)] * 2, "a copy is no candidate of its own"
    pairs = [json.loads(line) for line in (tmp_path / "scores/held-out/CSV/pairs.jsonl").read_text().splitlines()]
    assert [pair["row"] for pair in pairs] == [55, 56, 57, 58, 59] and "empty, in 'caption'" in pairs[-1]["error"]
    from vlm2vec.evaluation.loaders import load_task
    from vlm2vec.evaluation.loaders.pairs import pair_tasks

    data = load_task(pair_tasks(tmp_path / "scores/held-out")[0], tmp_path / "scores/held-out", ".")
    assert [sorted(labels) for labels in data.labels] == [[0], [0], [1, 2], [1, 2], [-1]], "equal queries share their answers"
    shutil.rmtree(tmp_path / "scores")
    path.write_text(path.read_text().replace("held_out:", "plan: null\nheld_back:"))
    assert_refused(capsys, ["eval", place / "model", "--data", path, "--output", "scores"], "unknown recipe key held_back")
    path = write(tmp_path, place, *told, held_out=None)
    assert_refused(capsys, ["eval", place / "model", "--data", path, "--output", "scores"], "holds no rows back to evaluate on")
