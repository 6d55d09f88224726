"""The card, `embed`, `index`, `search` and the README speak the same words; folders with damaged files; several queries."""

import json
import os
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from tests.helpers.repository import ROOT
from tests.helpers.tiny_models import qwen2_vl, qwen3_vl
from vlm2vec.checkpoint import words
from vlm2vec.cli import main
from vlm2vec.commands.search import QUICKSTART_MODEL, model_and_queries
from vlm2vec.model import VLM2Vec

NAMES = ("fox.png", "more/owl.jpg", "red.webp")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("words")
    qwen2_vl(place / "model")
    (place / "pictures/more").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(place / "pictures" / name)
    return place


@pytest.fixture
def damaged(place, tmp_path):
    """The same pictures and two files that are none."""
    for name in NAMES:
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(place / "pictures" / name, tmp_path / "pictures" / name)
    (tmp_path / "pictures/cut.png").write_bytes((place / "pictures/fox.png").read_bytes()[:500])
    (tmp_path / "pictures/note.jpg").write_text("no picture")
    return tmp_path / "pictures"


def rows_of(file):
    with safe_open(file, "pt") as f:
        return dict(zip(json.loads(f.metadata()["keys"]), f.get_tensor("embeddings").numpy())), f.metadata()


def ran(capsys, *argv, code=0):
    assert main([str(word) for word in argv]) == code
    return capsys.readouterr()


def found(capsys, *argv):
    return json.loads(ran(capsys, "search", *argv, "--json").out)


# -- one set of words --------------------------------------------------------------------------------------------------

QUERY = "Find me an everyday image that matches the given caption: a fox\n"
DOCUMENT = "<|image_1|>\nRepresent the given image.\n"


@pytest.mark.parametrize(
    ("x", "role", "text"),
    [
        ("a fox", "query", QUERY),
        ("a fox", "document", None),
        ({"text": "a fox"}, "query", QUERY),
        (Path("fox.png"), "document", DOCUMENT),
        ({"image": "fox.png"}, "document", DOCUMENT),
        (Path("fox.png"), "query", "<|image_1|>\nFind a day-to-day image that looks similar to the provided image.\n"),
        ({"video": "fox.mp4"}, "document", "<|video_1|> Understand the content of the provided video."),
        ({"text": "what?", "image": "fox.png"}, "query", None),
        ({"text": DOCUMENT, "image": "fox.png"}, "document", None),
        ({"image": "fox.png", "instruction": "Find it."}, "query", None),
        ({"images": ["a.png", "b.png"]}, "document", None),
        ({"text": ""}, "query", None),
        (7, "query", None),
    ],
)
def test_what_is_said_around_an_input(x, role, text):
    made = words.in_mmebs_words(x, role)
    if text is None:
        assert made is x or made.text == "", "words of its own are left alone"
    else:
        assert made.text == text


@pytest.mark.parametrize("role", ["query", "document"])
def test_embed_says_what_search_says(place, tmp_path, capsys, role):
    ran(capsys, "embed", place / "model", place / "pictures", "--text", "a fox", "--as", role, "-o", tmp_path / "e.safetensors")
    rows, about = rows_of(tmp_path / "e.safetensors")
    model = VLM2Vec.from_pretrained(place / "model")
    picture = place / "pictures/fox.png"
    pictured = {"query": f"<|image_1|>\n{words.FIND_BY_IMAGE}\n", "document": DOCUMENT}[role]
    truth = model.encode([{"text": pictured, "image": picture}, QUERY if role == "query" else "a fox"])
    np.testing.assert_allclose([rows[str(picture)], rows["a fox"]], truth, atol=1e-6)
    assert about["as"] == role


def test_a_model_with_prompts_of_its_own_is_fed_by_those(tmp_path, capsys):
    folder = tmp_path / "Qwen3-VL-Embedding-2B"
    folder.mkdir()
    qwen3_vl(folder)
    ran(capsys, "embed", folder, "--text", "a fox", "--as", "query", "-o", tmp_path / "e.safetensors")
    model = VLM2Vec.from_pretrained(folder)
    np.testing.assert_allclose(rows_of(tmp_path / "e.safetensors")[0]["a fox"], model.encode_query("a fox"), atol=1e-6)
    assert "encode_query" in "\n".join(words.example("folder", model.prompts))


def test_the_two_commands_of_the_readme_combine(place, tmp_path, capsys):
    ran(capsys, "embed", place / "model", place / "pictures", "--as", "document", "-o", tmp_path / "e.safetensors")
    by_file = found(capsys, place / "model", "a fox", "--embeddings", tmp_path / "e.safetensors")
    by_folder = found(capsys, place / "model", "a fox", "--images", place / "pictures")
    assert [hit["score"] for hit in by_file[0]["results"]] == pytest.approx([hit["score"] for hit in by_folder[0]["results"]], abs=1e-6)
    ran(capsys, "embed", place / "model", place / "pictures", "-o", tmp_path / "bare.safetensors")
    told = ran(capsys, "search", place / "model", "a fox", "--embeddings", tmp_path / "bare.safetensors").err
    assert "bare.safetensors was embedded without words around its inputs; embed --as document says those" in told


def test_the_lines_of_the_card_and_of_the_readme_find_what_search_finds(place, capsys, monkeypatch):
    monkeypatch.chdir(place / "pictures")
    model = VLM2Vec.from_pretrained(place / "model")
    lines = "\n".join(words.example("../model", model.prompts))
    assert lines.startswith("from vlm2vec import VLM2Vec\n")
    names = {"print": lambda *_: None}
    exec(lines.replace("picture.jpg", "fox.png").replace("a caption", "a fox"), names)
    (score,) = (hit["score"] for hit in found(capsys, place / "model", "a fox", "--images", ".")[0]["results"] if hit["key"] == "fox.png")
    assert float(names["model"].similarity(names["queries"], names["documents"])) == pytest.approx(score, abs=1e-5)
    readme = (ROOT / "README.md").read_text()
    for text in (QUERY.replace("a fox", "an owl"), DOCUMENT):
        assert json.dumps(text) in readme
    assert "--as document -o drawings.safetensors" in readme and "--embeddings drawings.safetensors" in readme


# -- several queries, JSON, an index -----------------------------------------------------------------------------------


def test_several_queries_and_an_index(place, tmp_path, capsys):
    index = tmp_path / "index.safetensors"
    assert "3 images" in ran(capsys, "index", place / "pictures", "--model", place / "model", "-o", index).out
    queries = ["a fox", "an owl", str(place / "pictures/red.webp")]
    found_by = {
        "folder": found(capsys, place / "model", *queries, "--images", place / "pictures", "-k", 2),
        "index": found(capsys, *queries, "--index", index, "-k", 2),  # the model that made it is the default
        "option": found(capsys, *queries, "--model", place / "model", "--index", index, "-k", 2),
    }
    for way, results in found_by.items():
        assert [one["query"] for one in results] == queries, way
        assert all([hit["rank"] for hit in one["results"]] == [1, 2] and one["results"][0]["key"] in NAMES for one in results), way
        ours, theirs = ([hit["score"] for one in made for hit in one["results"]] for made in (results, found_by["folder"]))
        assert ours == pytest.approx(theirs, abs=1e-6), way
    single = [found(capsys, place / "model", query, "--images", place / "pictures", "-k", 2)[0] for query in queries]
    assert [one["results"][0]["key"] for one in single] == [one["results"][0]["key"] for one in found_by["folder"]]
    table = ran(capsys, "search", *queries[:2], "--index", index, "-k", 1).out.splitlines()
    assert table[::3] == queries[:2] and len(table) == 6


def test_an_index_of_another_model_is_told(place, tmp_path, capsys):
    other = VLM2Vec.from_pretrained(place / "model")
    next(other.model.parameters()).data.mul_(2)
    other.save_pretrained(tmp_path / "other")
    ran(capsys, "index", place / "pictures", "--model", place / "model", "-o", tmp_path / "i.safetensors")
    err = ran(capsys, "search", "a fox", "--model", tmp_path / "other", "--index", tmp_path / "i.safetensors", code=2).err
    assert "was made by another model" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("said", "model", "of_index", "wanted"),
    [
        (["a fox"], None, None, (QUICKSTART_MODEL, ["a fox"])),
        (["a fox", "an owl"], None, None, (QUICKSTART_MODEL, ["a fox", "an owl"])),
        (["fox", "owl"], None, None, (QUICKSTART_MODEL, ["fox", "owl"])),
        (["folder", "owl"], None, None, ("folder", ["owl"])),
        (["Qwen/Qwen3-VL-Embedding-2B", "a fox", "owl"], None, None, ("Qwen/Qwen3-VL-Embedding-2B", ["a fox", "owl"])),
        (["./gone", "owl"], None, None, ("./gone", ["owl"])),  # told as a missing model, not searched for
        (["gone/fox.png", "owl"], None, None, (QUICKSTART_MODEL, ["gone/fox.png", "owl"])),
        (["folder/fox.txt", "owl"], None, None, (QUICKSTART_MODEL, ["folder/fox.txt", "owl"])),
        (["folder", "owl"], "other", None, ("other", ["folder", "owl"])),
        (["a fox"], None, "its/own", ("its/own", ["a fox"])),
        (["folder", "a fox"], None, "its/own", ("folder", ["a fox"])),
    ],
)
def test_which_word_is_the_model(tmp_path, monkeypatch, said, model, of_index, wanted):
    monkeypatch.chdir(tmp_path)
    for folder in (QUICKSTART_MODEL, "folder"):
        Path(folder).mkdir(parents=True)
    Path("folder/fox.txt").touch()
    assert model_and_queries(Namespace(words=said, model=model), of_index) == wanted


# -- damaged files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["embed", "index"])
def test_what_can_be_read_is_kept(place, damaged, tmp_path, capsys, command):
    out = tmp_path / "e.safetensors"
    argv = ["embed", place / "model", damaged] if command == "embed" else ["index", damaged, "--model", place / "model"]
    err = ran(capsys, *argv, "-o", out, code=2).err
    assert "cut.png" in err and err.count("\n") == 1 and not out.exists()
    told = ran(capsys, *argv, "-o", out, "--skip-bad").err
    assert re.search(r"left out 2 of 5 \w+s that cannot be read:\n  .*cut.png.*\n  .*note.jpg.*\n", told)
    rows, _ = rows_of(out)
    ran(capsys, *(str(word).replace(str(damaged), str(place / "pictures")) for word in argv), "-o", tmp_path / "whole.safetensors")
    whole, _ = rows_of(tmp_path / "whole.safetensors")
    assert [Path(key).name for key in rows] == [Path(name).name for name in NAMES]
    np.testing.assert_allclose(list(rows.values()), list(whole.values()), atol=1e-6)


def test_search_leaves_them_out(place, damaged, capsys):
    assert "cut.png" in ran(capsys, "search", place / "model", "a fox", "--images", damaged, code=2).err
    assert main(["search", str(place / "model"), "a fox", "--images", str(damaged), "--skip-bad", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "left out 2 of 5 images" in err and {hit["key"] for hit in json.loads(out)[0]["results"]} == set(NAMES)


def test_rows_of_a_file_are_left_out_by_their_keys(place, tmp_path, capsys):
    lines = [
        {"key": "good", "text": "a fox"},
        {"key": "gone", "image": "gone.png"},
        {"key": "odd", "text": 7},
        {"key": "fine", "text": "b"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for extra in ([], ["--prompt", "Find: "], ["--as", "query"]):
        err = ran(capsys, "embed", place / "model", tmp_path / "rows.jsonl", "-o", tmp_path / "e.safetensors", *extra, code=2).err
        assert "input 1 (gone): " in err
        told = ran(capsys, "embed", place / "model", tmp_path / "rows.jsonl", "-o", tmp_path / "e.safetensors", "--skip-bad", *extra).err
        assert "left out 2 of 4 inputs" in told and "  gone: " in told and "  odd: 'text' must be a str, got int" in told
        assert list(rows_of(tmp_path / "e.safetensors")[0]) == ["good", "fine"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["embed", "MODEL", "BAD", "-o", "OUT", "--skip-bad"], "none of the 2 inputs can be read"),
        (["index", "BAD", "--model", "MODEL", "-o", "OUT", "--skip-bad"], "none of the 2 images can be read"),
        (["search", "MODEL", "fox", "--images", "BAD", "--skip-bad"], "none of the 2 images can be read"),
        (["embed", "MODEL", "--text", "a", "-o", "OUT", "--as", "query", "--prompt", "x"], "give --as or --prompt, one of them"),
        (["embed", "MODEL", "--text", "a", "-o", "OUT", "--as", "target"], "invalid choice: 'target'"),
        (["index", "PICTURES", "-o", "OUT"], "no model named"),
        (["index", "PICTURES", "--model", "MODEL", "-o", "x.npy"], "ends in .safetensors"),
        (["search", "MODEL", "fox", "", "--images", "PICTURES"], "a query is empty"),
        (
            ["search", "MODEL", "fox", "--images", "PICTURES", "--index", "x"],
            "--images DIR or --embeddings FILE or --index FILE, one of them",
        ),
        (["search", "fox", "--index", "x.safetensors"], "x.safetensors: no such file"),
        (["search", "./gone", "fox", "--images", "PICTURES"], "gone"),
    ],
)
def test_misuse_is_one_line(place, damaged, tmp_path, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("cut.png", "note.jpg"):
        os.link(damaged / name, bad / name)
    names = {"MODEL": place / "model", "BAD": bad, "PICTURES": place / "pictures", "OUT": tmp_path / "out.safetensors"}
    err = ran(capsys, *(names.get(word, word) for word in argv), code=2).err
    assert said in err and err.count("\n") == 1 and len(err) < 700 and not (tmp_path / "out.safetensors").exists()
