"""What a recipe says of own data: keys that do not go together, files that are not there, scores and grades out of any table."""

import re

import pytest

from tests.helpers.own_data import rows, source, write_csv, write_pictures
from train.data.fingerprints import fingerprints
from train.data.rows import PairDataset
from train.data.sources import open_source
from train.plan.batch import absent
from train.plan.gpus import GPUS
from train.plan.search import Planner
from train.recipe.from_yaml import build
from train.recipe.schema import Data, Recipe, Source

OWN = {"name": "shop", "path": "captions.csv", "query": "caption", "target": {"image": "file"}}


def recipe(*sources, **data):
    values = {"model": "m", "output": "o", "steps": 1, "global_batch": 4, "cpu": True}
    return build(Recipe, values | {"data": data | {"sources": list(sources)}}, where="")


REFUSED = {
    "no query": ({"query": None}, {}, "source shop: expected what its query is, got none; say query: COLUMN"),
    "columns without a path": ({"path": None}, {}, "source shop: expected path beside query, got none; say path: FILE, or leave query out"),
    "an empty path": ({"path": " "}, {}, "source shop: path must be the name of a file"),
    "two places": ({"root": "r"}, {}, "source shop: path and root both say where its rows are; expected one of them: drop root"),
    "two places, a file": ({"file": "r"}, {}, "path and file both say"),
    "a format": ({"format": "visrag"}, {}, "format visrag has its own columns, path says them by query and target"),
    "negatives that nobody uses": ({"negatives": "other"}, {}, "negatives are named, and data.hard_negatives is false"),
    "a query of nothing": ({"query": {}}, {}, "source shop: query: expected a column, or some of text, image, video, instruction"),
    "a half brace": ({"query": "Find {caption"}, {}, "source shop: query: .*double braces that are text"),
    "an unknown key": ({"qery": "x"}, {}, r"unknown recipe key data.sources\[0\].qery; did you mean data.sources\[0\].query"),
    "a number as a group": ({"group": 5}, {}, r"data.sources\[0\].group must be of type str, got 5"),
    "twice": (None, {}, "data.sources names 'shop' twice"),
    "the output": ({"images": "o"}, {}, "output and source shop's images are one folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_keys_that_do_not_go_together(case):
    changes, data, said = REFUSED[case]
    told = [OWN, OWN] if changes is None else [OWN | changes]
    with pytest.raises(ValueError, match=said) as caught:
        recipe(*told, **data)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_own_data_needs_no_root_and_stands_beside_mmebs(tmp_path):
    assert recipe(OWN).data.root is None
    with pytest.raises(ValueError, match="the recipe lacks data.root, data.images, which source Texts needs; .* or path: FILE"):
        recipe(OWN, {"name": "Texts"})
    both = recipe(OWN, {"name": "Texts"}, root="r", images="i")
    assert build(Recipe, both.to_dict(), where="") == both, "a recipe that was written out is the recipe"
    assert recipe(OWN | {"query": "title"}, OWN).data.sources[0].query == "title", "one file may be two sources"


def test_a_table_that_is_not_there_is_told_with_its_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path, tmp_path, rows())

    def refused(said, **changes):
        with pytest.raises(ValueError, match=said) as caught:
            open_source(Data(), Source(**OWN | changes))
        assert str(caught.value).startswith("source shop: ") and len(str(caught.value)) < 500

    refused(re.escape(f"no such file or folder as gone.csv (in {tmp_path}); mend path"), path="gone.csv")
    refused("images: no such folder as pics .in .*; name the one where paths of media start", images="pics")
    refused("query: no column 'captoin', the data has caption, file, .*; did you mean 'caption'", query="captoin")
    refused("group: no column 'products', .*; did you mean 'product'", group="products")
    refused("scores: no column 's9', .*; did you mean 's", scores=["s0", "s9"])
    (tmp_path / "empty.csv").write_text("caption,file\n")
    refused("empty.csv holds no rows; write some", path="empty.csv")
    (tmp_path / "bad.csv").write_text("caption,file\na\nb,c,d\n")
    refused("bad.csv holds no rows .bad.csv, line 2: 1 cells, expected the 2", path="bad.csv")


def test_lines_that_are_no_rows_stop_a_strict_run(tmp_path):
    (tmp_path / "bad.csv").write_text("caption,file\na,b\nc\n")
    told = Source(**OWN | {"path": str(tmp_path / "bad.csv")})
    assert open_source(Data(), told).left_out == ("bad.csv, line 3: 1 cells, expected the 2 of the first line, in 'c'",)
    with pytest.raises(ValueError, match="source shop: bad.csv, line 3: 1 cells, .*; mend it, or set data.strict to false"):
        open_source(Data(strict=True), told)


def test_scores_and_grades_are_numbers_of_any_table(tmp_path):
    cells = 'q,t,n,s,g,one,two\nq0,t0,"[""a"", ""b""]","[3, 1.5, -2]",0.5,1,2\nq1,t1,[],[3],x,1,\nq2,t2,a,"[3]",nan,1,2\n'
    (tmp_path / "rows.csv").write_text(cells)

    def labels(row, documents, **columns):
        told = Source("x", path=str(tmp_path / "rows.csv"), query="q", target="t", negatives="n", **columns)
        return open_source(Data(hard_negatives=True), told).labels(row, documents)

    assert labels(0, 3, scores="s", grade="g") == {"grade": 0.5, "scores": [3.0, 1.5, -2.0]}
    assert labels(0, 2, scores=["one", "two"]) == {"scores": [1.0, 2.0]}
    for row, documents, columns, said in (
        (1, 1, {"grade": "g"}, "column 'g': expected a finite number, got x; mend the row"),
        (2, 1, {"grade": "g"}, "column 'g': expected a finite number, got nan"),
        (1, 2, {"scores": ["one", "two"]}, "column 'two': expected a finite number, got ; mend the row"),
        (2, 2, {"scores": "s"}, "column 's': expected 2 scores, the positive's first and one a hard negative, got 1 of them"),
        (0, 3, {"scores": ["one", "two"]}, "column 'one', 'two': expected 3 scores"),
    ):
        with pytest.raises(ValueError, match=said):
            labels(row, documents, **columns)


def test_first_rows_and_whether_the_data_is_here(tmp_path):
    write_pictures(tmp_path / "pictures")
    told = source("JSONL", tmp_path / "rows", tmp_path / "pictures")
    data = Data(sources=[Source(**told | {"rows": 7})], hard_negatives=True)
    assert len(open_source(data, data.sources[0])) == 7 and open_source(data, data.sources[0]).groups()[-1] == "p3"
    here, gone = recipe(told, hard_negatives=True), recipe(told | {"path": "gone.jsonl"}, hard_negatives=True)
    assert absent(here) is None and absent(gone) == "gone.jsonl"
    root = tmp_path / "rows"
    for told_of, place in (
        (gone, "gone.jsonl"),
        (recipe(told, {"name": "Texts"}, hard_negatives=True, root="no-root", images="i"), "no-root"),
        (recipe({"name": "Texts"}, told | {"path": "gone.csv"}, hard_negatives=True, root=str(root), images="i"), "gone.csv"),
    ):
        with pytest.raises(ValueError, match=f"the data .{place}. is not here; say in `plan.rows` what a batch looks like"):
            Planner(told_of, GPUS["h100-80"])
    before = fingerprints(here)["data.shop"]
    lines = (tmp_path / "rows" / "captions.jsonl").read_text(encoding="utf-8").split("\n")
    (tmp_path / "rows" / "captions.jsonl").write_text("\n".join([*lines[:-1], "null"]), encoding="utf-8")
    assert fingerprints(here)["data.shop"] != before, "a last row that cannot be read is another one"


def test_a_row_that_fails_says_so_once_and_keeps_its_place(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "a", "t": "b"}\nnull\n{"q": "a", "t": ["b"]}\n')
    told = Source("x", path=str(tmp_path / "rows.jsonl"), query="q", target="t", group="q")

    class Counts:
        options = {"frames": 8, "fps": None, "max_frames": None}

        def __call__(self, item):
            return "blank"

        def measure(self, item):
            return item["text"]

    data = PairDataset(Data(sources=[told]), Counts())
    assert [data[0, row]["error"] for row in range(3)] == [
        None,
        "x, row 1: rows.jsonl, line 2: expected an object of column: value, got null; mend or remove it",
        "x, row 2: column 't': expected a text, got a list; name a value in it, or write one row a text",
    ]
    assert data[0, 1]["target_id"] == data[0, 2]["query_id"] == -1, "it is equal to nothing"
