"""Every kind of MMEB-V3's loaders on data of its layout, scored by hand (tests/helpers/v3_layouts.py)."""

import json
import os

import pytest
from PIL import Image

from tests.helpers import v3_layouts
from tests.helpers.angles import AngleModel
from vlm2vec.evaluation.loaders import LOADERS, load_task
from vlm2vec.evaluation.runner import Options, run_tasks
from vlm2vec.evaluation.tasks import find_tasks, load_tasks


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("v3")
    return root, *v3_layouts.everything(root)


def score(root, output, feeding="official", **options):
    tasks = find_tasks(root, protocol="v3")
    model = AngleModel()
    rows = run_tasks(model, tasks, root, root, output, options=Options(progress=False, protocol="v3", feeding=feeding, **options))
    return {row["task"]: row for row in rows}, model


def test_every_loader_kind_is_here(place):
    root, official, _ = place
    found = {task.name: task for task in find_tasks(root, protocol="v3")}
    assert set(found) == set(official)
    kinds = {task.loader for task in found.values()}
    v3_only = {task.loader for name, task in load_tasks("v3").items() if name not in load_tasks()}
    assert v3_only <= kinds and kinds <= set(LOADERS)


@pytest.mark.parametrize("feeding", ["official", "wemm"])
def test_scores_are_those_told_by_hand(place, tmp_path, feeding):
    root, official, other = place
    expected = official if feeding == "official" else {**official, **other}
    rows, _ = score(root, tmp_path / "out", feeding)
    for name, scores in expected.items():
        for metric, value in scores.items():
            found = rows[name]["without_excluded"]["score"] if metric == "without_excluded" else rows[name]["metrics"][metric]
            assert found == pytest.approx(value, abs=1e-6), (name, metric)
        modality, report = rows[name]["modality"], load_tasks("v3")[name].report_name
        for file in {f"{name}_score.json", f"{report if '/' in name else name}_score.json"}:
            told = json.loads((tmp_path / "out" / modality / file).read_text())
            settings = told["run"]["settings"]
            assert (settings["protocol"], settings["feeding"]) == ("v3", feeding) and told["hit@1"] == rows[name]["metrics"]["hit@1"]


def texts(items):
    return [item["text"] for item in items]


def read(root, name, feeding="official", **options):
    return load_task(load_tasks("v3")[name], root, root, feeding=feeding, **options)


def test_words_of_both_feedings(place, tmp_path):
    """What is fed, letter by letter, in the one way and the other."""
    root, _, _ = place
    bright = read(root, "text/BRIGHT/aops")
    assert texts(bright.queries) == ["angle:3", "angle:92.5"] and texts(bright.candidates)[1] == "angle:20"
    assert bright.problems.summary()["dropped_queries"]["rows"] == bright.problems.summary()["dropped_candidates"]["rows"] == 1
    assert bright.excluded == [[0], []] and not bright.problems
    other = read(root, "text/BRIGHT/aops", "wemm")
    assert other.queries[0]["text"] == "Given a Math problem, retrieve relevant examples that help answer the problem.\nangle:3"
    follow = read(root, "text/FollowIR/core17-instructions")
    assert follow.queries[0]["text"] == "Only courts. angle:12"
    assert texts(follow.candidates) == ["Zero\nangle:10", "angle:30", "angle:60"] and follow.names == ["0", "1", "two"]
    assert follow.grades == [[2, 1], [1]] and follow.label_names == [["1", "0"], ["two"]]
    tool = read(root, "toolde/web/apibank")
    assert tool.queries[0]["text"] == "Find a tool. angle:33"
    assert tool.candidates[0]["text"] == '{"name": "n0", "description": "angle:10 \\u00e9", "parameters": {"a": 1}}'
    lines = read(root, "toolde/web/apibank", "wemm")
    assert lines.queries[0]["text"] == "Find a tool.\nangle:33"
    assert lines.candidates[0]["text"] == 'Tool: n0\nDescription: angle:10 é\nparameters: {"a": 1}'
    memory = read(root, "memory/PeerQA")
    assert texts(memory.queries) == ["Find the answer. angle:20", "Find anything. angle:70"] and memory.local is None
    assert memory.names == ["PeerQA/one::d", "PeerQA/one::e", "PeerQA/two::d", "PeerQA/two::f"]
    local = read(root, "memory/PeerQA", "wemm")
    assert texts(local.queries)[0] == "Find the answer.\nangle:20" and local.local == [[0], [3, 2]]


def test_words_around_pictures_and_films(place):
    root, _, _ = place
    product = read(root, "MCMR")
    assert product.queries[0]["text"] == "Find an image-text pair that matches the given query angle:15"
    assert product.candidates[0]["text"] == "<|image_1|>  title: A\ndescription: one two\nfeatures: f g\nprice: 9"
    assert product.candidates[2] == {"text": "title: C\nDate First Available: May"}
    assert product.problems.summary()["no_picture"]["rows"] == 1
    other = read(root, "MCMR", "wemm")
    assert other.queries[0]["text"] == "Find products matching the following description:\nangle:15"
    assert other.candidates[0]["text"] == "Title: A\nDescription: one two\nPrice: $9\nFeatures: f; g"
    assert "none of its pictures" in other.candidates[2]["unreadable"]
    image = read(root, "ImageNet-A", "wemm")
    assert image.queries[0]["text"].startswith("Represent the given image for robust object classification")
    assert read(root, "ImageNet-A").queries[0]["text"] == "<|image_1|>\nRepresent the given image for classification\n"
    document = read(root, "ViDoRe_docvqa", "wemm")
    assert document.queries[0]["text"] == "angle:2\nFind a document image that matches the given query:"
    assert document.candidates[0]["text"] == "Describe the content of this document image."
    assert read(root, "ViDoRe_docvqa").candidates[0]["text"].startswith("<|image_1|> Understand")
    film = read(root, "MVBench", "wemm")
    assert film.queries[0]["text"] == "Question: What\nOptions:\n(A) ice\n(B) angle:49\nQuestion: What"
    assert len(film.queries) == 20 and texts(film.candidates) == ["(A) ice", "(B) angle:49"]
    assert read(root, "Breakfast", "wemm").names == ["milk"] and len(read(root, "Breakfast").names) == 10
    sound = read(root, "NSynth")
    assert sound.names == ["angle:90", "1", "angle:28"], "by integer id; an id that no row has is its number"
    assert sound.queries[0]["text"] == "Recognize the musical instrument category of the audio."
    assert read(root, "Clotho").queries[2]["text"].endswith("textual description.\nQuery: angle:95")


def test_tools_are_read_once_and_by_category(tmp_path):
    """Tasks of one category share their candidates; a corpus of several categories is ranked by the query's own."""
    expected = v3_layouts.tools(tmp_path)
    other = tmp_path / "tool-tasks" / "ToolDe-Queries" / "web" / "apigen" / "queries-00000-of-00001.parquet"
    other.parent.mkdir(parents=True)
    other.write_bytes((tmp_path / "tool-tasks/ToolDe-Queries/web/apibank/queries-00000-of-00001.parquet").read_bytes())
    one, two = read(tmp_path, "toolde/web/apibank"), read(tmp_path, "toolde/web/apigen")
    assert one.candidates is two.candidates and one.local is None and expected
    assert read(tmp_path, "toolde/web/apibank", "wemm").candidates is not one.candidates
    tools = tmp_path / "tool-tasks" / "ToolDe-Candidates" / "web" / "tools-00000-of-00001.parquet"
    rows = [
        {"id": f"t{i}", "documentation": f"angle:{a}", "category": c} for i, (a, c) in enumerate(((10, "web"), (33, "code"), (90, "web")))
    ]
    v3_layouts.table(tools, *rows)
    loaded = read(tmp_path, "toolde/web/apibank")
    assert loaded.local == [[0, 2], [0, 2]] and texts(loaded.candidates)[1] == "angle:33"
    assert loaded.problems.summary()["not_json"]["rows"] == 3 and not loaded.problems
    v3_layouts.table(tools, *(row | {"category": row["category"].replace("web", "customized")} for row in rows))
    with pytest.raises(ValueError, match="row 0: category 'web' has no tools; the corpus has customized, code"):
        read(tmp_path, "toolde/web/apibank")


def test_films_of_ave_lie_beside_its_sounds(tmp_path):
    """The archive holds film files in AVE/AVE_Dataset/AVE; frames are made of them in a folder that is not the working directory."""
    base = tmp_path / "audio-tasks/AVE/AVE_Dataset"
    (base / "AVE").mkdir(parents=True)
    pictures = [Image.new("RGB", (32, 24), (80 * i, 0, 0)) for i in range(3)]
    pictures[0].save(base / "AVE" / "v1.gif", save_all=True, append_images=pictures[1:])
    (base / "testSet.txt").write_text("Dog&v1&good&0&5\nCat&v2&good&1&3\n", encoding="utf-8")
    here = sorted(os.listdir())
    data = read(tmp_path, "AVE")
    assert len(data.candidates[0]["video"]) == 3 and data.candidates[1]["unreadable"].endswith("audio-tasks/AVE/AVE_Dataset/AVE")
    assert not any(str(frame).startswith(os.getcwd()) for frame in data.candidates[0]["video"]) and sorted(os.listdir()) == here


def test_several_screenshots(place):
    root, _, _ = place
    screen = read(root, "GAE-GUIAct_q2s")
    assert screen.names == ["c1", "c3", "c2", "c4"], "the queries' candidates go before the corpus"
    first, third, second, trajectory = screen.candidates
    assert len(trajectory["image"]) == 10 and trajectory["text"].count("<|image_1|>") == 10
    assert [path.rpartition("/")[2] for path in first["image"]] == ["p10.png", "p11.png"] and first["text"].count("<|image_1|>") == 2
    assert second["image"] is None and third["image"].endswith("p80.png")
    assert len(screen.queries) == 4 and screen.problems.summary()["duplicate_queries"]["rows"] == 2
    merged = read(root, "GAE-GUIAct_q2s", "wemm")
    assert merged.names == ["c1", "c3", "c4"] and [q["text"] for q in merged.queries] == ["angle:12", "angle:38", "angle:40"]
    from vlm2vec.evaluation.loaders.screens import side

    many = side("a <|image_1|> b <|image_1|> c <|image_1|> d", ["1", "2", "3"], root, most=2)
    assert many["text"] == "a <|image_1|> b <|image_1|> c  d" and len(many["image"]) == 2


def test_further_tables_of_sounds(tmp_path):
    """ESC-50's, SpeechCommands' and CREMA-D's columns and places; labels without ids are sorted by name."""
    import csv

    from tests.helpers.angles import sound

    base = tmp_path / "audio-tasks"
    heard = [{"bytes": sound(base / f"{a}.wav", a).read_bytes(), "path": None} for a in (20, 80)]
    rows = [{"audio": clip, "target": 1 - i, "category": f"angle:{a}"} for i, (clip, a) in enumerate(zip(heard, (21, 79)))]
    v3_layouts.table(base / "esc50" / "data" / "test-0.parquet", *rows)
    rows = [{"audio": clip, "label_id": i, "label_name": f"angle:{a}"} for i, (clip, a) in enumerate(zip(heard, (79, 21)))]
    v3_layouts.table(base / "speechcommand-1k" / "query_eval.parquet", *rows)
    (base / "creamD").mkdir()
    with open(base / "creamD" / "processed.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "label", "label_name"], ["x.wav", "ANG", "angle:50"], ["y.wav", "SAD", "angle:100"]])
    sound(base / "creamD" / "x.wav", 52)
    sound(base / "creamD" / "y.wav", 60)
    assert read(tmp_path, "ESC-50").names == ["angle:79", "angle:21"]
    assert read(tmp_path, "CREMA-D").names == ["angle:100", "angle:50"]
    rows, _ = score(tmp_path, tmp_path / "out")
    assert {name: row["score"] for name, row in rows.items()} == {"ESC-50": 1.0, "SpeechCommands": 0.0, "CREMA-D": 0.5}
    (base / "creamD" / "processed.csv").unlink()
    rows = [{"audio": clip, "label": 0, "label_name": name} for clip, name in zip(heard, ("angry", "sad"))]
    v3_layouts.table(base / "creamD" / "data" / "test-0.parquet", *rows)
    with pytest.raises(ValueError, match="row 1: label 0 is 'sad' here and 'angry' before; one is wrong"):
        read(tmp_path, "CREMA-D")


def test_parts_of_recordings(place):
    root, _, _ = place
    loaded = read(root, "TUTSound")
    assert loaded.names[:3] == ["audio/r.wav|0.000-2.000", "audio/r.wav|2.000-4.000", "audio/r.wav|4.000-4.050"]
    # windows of a second every half: those that reach into an event by a tenth and more of both together are no background
    assert loaded.names[3:] == ["audio/r.wav|4.000-5.000", "audio/r.wav|4.500-5.500", "audio/r.wav|5.000-6.000"]
    assert loaded.labels == [[0, 2], [1], [0, 2]] and read(root, "TUTSound(hard)").labels == [[0], [1], [2]]
    assert loaded.candidates[1]["audio"].start == 2.0 and loaded.queries[0]["text"].endswith("Query: angle:22")
