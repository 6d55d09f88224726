"""Tables with bytes lost, changed, moved or put in: refused in one line, or their rows told one by one; never another exception."""

import random

import pytest

from tests.helpers.own_data import FORMS, source, write_pictures
from train.data.rows import PairDataset
from train.recipe.schema import Data, Source

PUT_IN = [b'"', b"\n", b"\0", b",", b"\xff", b"null\n", b"[", b"{", b'"""', b"\r"]
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".tar", ".arrow", ".md")
TURNS = 12


class Texts:
    """A processing that opens no pictures."""

    options = {"frames": 8, "fps": None, "max_frames": None}

    def __call__(self, item):
        return "blank"

    def measure(self, item):
        return item["text"]


def damaged(content: bytes, draw: random.Random) -> bytes:
    body, at, kind = bytearray(content), draw.randrange(len(content)), draw.randrange(5)
    if kind == 0:
        return bytes(body[:at])
    if kind == 1:
        for _ in range(draw.randrange(1, 20)):
            body[draw.randrange(min(len(body), 1 << draw.randrange(4, 20)))] = draw.randrange(256)
    elif kind == 2:
        body[at:at] = draw.choice(PUT_IN)
    elif kind == 3:
        del body[at : at + draw.randrange(600)]
    else:
        body = body[at:] + body[:at]
    return bytes(body)


@pytest.mark.parametrize("form", FORMS)
def test_damage_is_told_in_one_line(tmp_path, monkeypatch, form):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    told = source(form, tmp_path / "data", write_pictures(tmp_path / "pictures"))
    files = sorted(path for path in (tmp_path / "data").rglob("*") if path.suffix in TABLES)
    draw, opened = random.Random(form), 0
    for turn in range(TURNS):
        path = draw.choice(files)
        held = path.read_bytes()
        path.write_bytes(damaged(held, draw))
        try:
            data = PairDataset(Data(sources=[Source(**told)], hard_negatives=True), Texts(), 2)
            errors = [data[0, at]["error"] for at in range(data.sizes[0] + len(data.held_out_rows()[0]))]
            assert all(error.startswith("shop, row ") for error in errors if error), turn
            opened += 1
        except ValueError as error:
            assert str(error).startswith("source shop: ") and "\n" not in str(error) and len(str(error)) < 500, turn
        finally:
            path.write_bytes(held)
    assert opened < TURNS or form == "JSONL", "some of it was beyond reading; JSON lines lose lines alone"
