"""`vlm2vec index DIR -o INDEX` twice, and searches of it by words and by a picture, from the command line and from Python."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command_line import call
from tests.helpers.tiny_models import qwen2_vl
from vlm2vec import Index, VLM2Vec
from vlm2vec.checkpoint.words import said_as


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("index")
    qwen2_vl(place / "model")
    (place / "pictures/more").mkdir(parents=True)
    for i, name in enumerate(("fox.png", "more/owl.jpg", "red.webp")):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(place / "pictures" / name)
    (place / "pictures/note.txt").write_text("a note")
    return place


@pytest.fixture(scope="module")
def model(place):
    return VLM2Vec.from_pretrained(place / "model", device="cpu")


def test_index_search_and_index_again(place, model, tmp_path, capsys):
    folder, index = shutil.copytree(place / "pictures", tmp_path / "pictures"), tmp_path / "i"
    code, told, _ = call(capsys, "index", folder, "--model", place / "model", "-o", index)
    assert code == 0 and f"{index}: 4 added, 0 changed, 0 removed, 0 kept; 4 in it; vlm2vec search" in told
    keys = ["fox.png", "more/owl.jpg", "note.txt", "red.webp"]
    documents, prompt = said_as(model, [folder / "fox.png", folder / "more/owl.jpg", "a note", folder / "red.webp"], "document")
    vectors = model.encode(documents, prompt=prompt)
    for words, query in (("a fox", "a fox"), (folder / "red.webp", folder / "red.webp")):
        asked, prompt = said_as(model, [query], "query")
        truth = dict(zip(keys, vectors @ model.encode(asked, prompt=prompt)[0]))
        found = json.loads(call(capsys, "search", words, "--index", index, "--json", "-k", 9)[1])[0]["results"]
        assert {hit["key"]: hit["score"] for hit in found} == pytest.approx({k: float(v) for k, v in truth.items()}, abs=1e-5)
        assert [hit["key"] for hit in found] == sorted(truth, key=truth.get, reverse=True)
        hits = Index.open(index, model=model).search(query, 9)
        assert [(hit.key, hit.score) for hit in hits] == [(hit["key"], pytest.approx(hit["score"], abs=1e-6)) for hit in found]
    (folder / "fox.png").unlink()
    (folder / "note.txt").write_text("another note")
    shutil.copy(folder / "red.webp", folder / "more/red.webp")
    assert "1 added, 1 changed, 1 removed, 2 kept; 4 in it" in call(capsys, "index", folder, "-o", index)[1]
    assert "0 added, 0 changed, 0 removed, 4 kept" in call(capsys, "index", folder, "-o", index)[1]
    assert "0 added, 0 changed, 1 removed, 3 kept" in call(capsys, "index", folder, "-o", index, "--only", "image")[1]
    assert "0 added, 0 changed, 0 removed, 3 kept" in call(capsys, "index", folder, "-o", index)[1], "what was taken before is taken again"


def test_rows_of_a_jsonl(place, model, tmp_path, capsys):
    rows = [{"key": "a", "text": "a fox"}, {"key": "b", "image": "fox.png"}, {"key": "c", "image": "fox.png", "text": "what?"}]
    shutil.copy(place / "pictures/fox.png", tmp_path / "fox.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "3 added" in call(capsys, "index", tmp_path / "rows.jsonl", "--model", place / "model", "-o", tmp_path / "i")[1]
    index = Index.open(tmp_path / "i", model=model)
    assert {hit.key: (hit.kind, hit.file, hit.text) for hit in index.search("x")} == {
        "a": ("row", "", "a fox"),
        "b": ("row", str(tmp_path / "fox.png"), ""),
        "c": ("row", str(tmp_path / "fox.png"), "what?"),
    }
    rows[2]["text"] = "and now?"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [rows[2], rows[0]])))
    assert "0 added, 1 changed, 1 removed, 1 kept" in call(capsys, "index", tmp_path / "rows.jsonl", "-o", tmp_path / "i")[1]
    Image.new("RGB", (60, 60)).save(tmp_path / "fox.png")
    assert "0 added, 1 changed, 0 removed, 1 kept" in call(capsys, "index", tmp_path / "rows.jsonl", "-o", tmp_path / "i")[1]
    (tmp_path / "rows.jsonl").write_text('{"key": "a", "text": "x"}\n{"key": "a", "text": "y"}')
    code, _, told = call(capsys, "index", tmp_path / "rows.jsonl", "-o", tmp_path / "i")
    assert code == 2 and "line 2: a row with the key 'a' stands above" in told


def test_misuse_is_one_line(place, tmp_path, capsys):
    bad = shutil.copytree(place / "pictures", tmp_path / "bad")
    (bad / "cut.png").write_bytes((bad / "fox.png").read_bytes()[:500])
    call(capsys, "index", place / "pictures", "--model", place / "model", "-o", tmp_path / "i")
    other = VLM2Vec.from_pretrained(place / "model", device="cpu")
    next(other.model.parameters()).data.mul_(2)
    other.save_pretrained(tmp_path / "other")
    for words, said in [
        (("index", bad, "--model", place / "model", "-o", tmp_path / "j"), "cut.png"),
        (("index", place / "pictures", "--model", tmp_path / "other", "-o", tmp_path / "i"), "was made by another model"),
        (("search", "a fox", "--model", tmp_path / "other", "--index", tmp_path / "i"), "was made by another model"),
        (("index", place / "pictures", "-o", tmp_path / "x.faiss"), "expected a folder to write the index into"),
        (("index", place / "pictures", "--model", place / "model", "-o", place / "model"), "holds other files and no index"),
        (("index", place / "gone", "--model", place / "model", "-o", tmp_path / "k"), "there is no such"),
        (("search", "a fox", "--index", place / "pictures"), "no index in it"),
    ]:
        code, _, told = call(capsys, *words)
        assert code == 2 and said in told and told.count("\n") == 1 and len(told) < 500, told
    assert not (tmp_path / "j" / "index.json").exists() and not (tmp_path / "k").exists()
    code, told, left = call(capsys, "index", bad, "--model", place / "model", "-o", tmp_path / "j", "--skip-bad")
    assert code == 0 and "4 added" in told and "1 left out" in told and "cut.png" in left
