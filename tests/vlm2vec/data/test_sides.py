"""What a recipe says of its columns: words around them, pictures, films and lists of negatives; and what it must not say."""

import json
from pathlib import Path

import pytest

from tests.helpers.film_files import number_of, shade, write_film
from vlm2vec.data.sides import columns_of
from vlm2vec.data.tables import open_table
from vlm2vec.media import read_frames


def opened(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return open_table(str(path))


def sides(tmp_path, row, query="q", target="t", negatives=None, images=None):
    table = opened(tmp_path, row)
    return columns_of(table, query, target, negatives, images).convert(table[0], "", None)


def test_words_around_columns(tmp_path):
    row = {"q": "shoe", "price": 12.5, "t": "x", "a b": "c", "n": {"m": "deep"}}
    told = {"text": "{{Find}} {q} for {price}: {a b}, {n.m}\n", "instruction": "Say {t}"}
    assert sides(tmp_path, row, query=told)[0] == {"text": "{Find} shoe for 12.5: c, deep\n", "image": None, "instruction": "Say x"}
    assert sides(tmp_path, row, query="Find: {q}")[0]["text"] == "Find: shoe"
    assert sides(tmp_path, row, query={"text": "q"})[0]["text"] == "shoe", "a column without braces"


def test_a_text_with_an_empty_column_stays_and_one_of_empty_columns_goes(tmp_path):
    row = {"q": "", "more": "m", "file": "a.png", "t": "t"}
    assert sides(tmp_path, row, query={"text": "{q} {more}"})[0]["text"] == " m"
    query = sides(tmp_path, row, query={"text": "Titled {q}", "image": "file"})[0]
    assert query == {"text": "", "image": str(tmp_path / "a.png")}
    with pytest.raises(ValueError, match="query: empty, in 'q'; fill one of them or remove the row"):
        sides(tmp_path, row, query={"text": "Titled {q}"})


def test_paths_start_at_the_table_or_where_it_is_said(tmp_path):
    row = {"q": "q", "t": " pics/../a.png "}
    assert sides(tmp_path, row, target={"image": "t"})[1]["image"] == str(tmp_path / "a.png")
    assert sides(tmp_path, row, target={"image": "t"}, images="/elsewhere")[1]["image"] == "/elsewhere/a.png"
    assert sides(tmp_path, row | {"t": "/abs/b.png"}, target={"image": "t"}, images="/else")[1]["image"] == "/abs/b.png"
    assert sides(tmp_path, row | {"t": "data:image/png;base64,AAAA"}, target={"image": "t"})[1]["image"].startswith("data:")


def test_several_pictures_are_those_that_are_there(tmp_path):
    row = {"q": "q", "front": "f.png", "back": "", "more": ["1.png", "2.png"]}
    target = sides(tmp_path, row, target={"text": "Both.", "image": ["front", "back", "more"]})[1]
    assert [Path(image).name for image in target["image"]] == ["f.png", "1.png", "2.png"]


def test_films_are_files_folders_frames_and_bytes(tmp_path):
    film = write_film(tmp_path / "film.mp4", [shade(n) for n in range(6)])
    (tmp_path / "frames").mkdir()
    for number in range(3):
        shade(number).save(tmp_path / "frames" / f"{number}.png")
    row = {"q": "q", "film": "film.mp4", "folder": "frames", "list": ["frames/0.png", "frames/2.png"]}
    assert sides(tmp_path, row, target={"video": "film"})[1] == {"text": "", "image": None, "video": str(film)}
    assert [number_of(f) for f in read_frames(sides(tmp_path, row, target={"video": "film"})[1]["video"], 3)] == [0, 2, 5]
    assert len(read_frames(sides(tmp_path, row, target={"video": "folder"})[1]["video"])) == 3
    assert [Path(f).name for f in sides(tmp_path, row, target={"video": "list"})[1]["video"]] == ["0.png", "2.png"]
    table = opened(tmp_path, row)
    stored = row | {"film": {"bytes": film.read_bytes(), "path": None}}
    stored = columns_of(table, "q", {"video": "film"}, None, None).convert(stored, "", None)
    by_bytes = read_frames(stored[1]["video"], 3)
    assert [number_of(frame) for frame in by_bytes] == [0, 2, 5] and by_bytes.seconds == read_frames(film, 3).seconds
    with pytest.raises(ValueError, match="video 9 bytes: cannot be decoded"):
        read_frames(b"no film..")


# -- negatives ----------------------------------------------------------------------------------------------------------------------

ROW = {"q": "q", "t": "t.png", "n": "n.png", "many": ["1.png", "", "2.png"], "texts": '["a", "b"]', "empty": "", "two": ["x", "y", "z"]}
PICTURE = {"text": "<|image_1|>\nShow.\n", "image": "t"}


def names(negatives):
    return [(item["text"], Path(item["image"]).name if item["image"] else None) for item in negatives]


def test_a_column_alone_is_shown_as_the_target_is(tmp_path):
    words = PICTURE["text"]
    for told, expected in (
        ("n", [(words, "n.png")]),
        ("many", [(words, "1.png"), (words, "2.png")]),
        (["n", "many"], [(words, "n.png"), (words, "1.png"), (words, "2.png")]),
        ("empty", []),
        ({"image": "n"}, [(words, "n.png")]),
        ({"image": "n", "text": "Other words.\n"}, [("Other words.\n", "n.png")]),
        ({"text": "{two}", "image": "many"}, [("x", "1.png"), ("y", None), ("z", "2.png")]),
    ):
        assert names(sides(tmp_path, ROW, target=PICTURE, negatives=told)[2]) == expected, told
    said = sides(tmp_path, ROW, target={"text": "Name: {t}"}, negatives=["n", "texts"])[2]
    assert names(said) == [("Name: n.png", None), ("Name: a", None), ("Name: b", None)], "a CSV's cell holds a list as JSON writes it"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"text": "{two}", "image": ["many", "texts"]}, r"expected lists of one length, got 'two' has 3, 'many' has 3, 'texts' has 2"),
        ({"image": "q", "text": "{gone}"}, r"negatives: no column 'gone', the data has q, t, n"),
    ],
)
def test_negatives_that_do_not_fit(tmp_path, told, said):
    with pytest.raises(ValueError, match=said):
        sides(tmp_path, ROW, target=PICTURE, negatives=told)


# -- refusals -----------------------------------------------------------------------------------------------------------------------

OF_COLUMNS = {
    "a wrong column": ({"query": "titel"}, "query: no column 'titel', the data has title, .*; did you mean 'title'?"),
    "a wrong column in words": ({"query": "Find: {titel}"}, "query: no column 'titel', the data has title, .*; did you mean 'title'?"),
    "a wrong column of pictures": ({"target": {"image": "fiel"}}, "target: no column 'fiel', the data has .* did you mean 'file'?"),
    "a word that is no column": ({"query": {"text": "Shoes"}}, "query.text: 'Shoes' is no column, and a single word is taken for one"),
    "words near a column": ({"query": {"text": "title "}}, "query.text: 'title ' is no column.*did you mean 'title'"),
    "a value in a text": ({"query": "title.x"}, "column 'title.x': 'title' holds str values, in which there is no 'x'"),
    "a list as a text": ({"query": "list"}, "column 'list': expected a text, got a list"),
    "an object as a text": ({"query": "object"}, "column 'object': expected a text, got an object"),
    "a number as a picture": ({"target": {"image": "object.n"}}, "column 'object.n': expected the file of a picture, or its bytes, got 5"),
    "a URL": ({"target": {"image": "object.url"}}, "column 'object.url': https://x.org/a.png is a URL, and training reads files"),
    "a NUL": ({"target": {"image": "object.nul"}}, "a file's name holds no null character"),
    "a half brace": ({"query": {"text": "Find {title"}}, r"query.text: .*double braces that are text"),
    "no name in braces": ({"query": "Find {}"}, r"query: expected a column between braces, got \{\}"),
    "a format": ({"query": "Find {title:>3}"}, r"query: expected a column between braces, got \{title:>3\}"),
    "an unknown key": ({"query": {"texts": "title"}}, "query: unknown key 'texts'; there are text, image, video, instruction"),
    "a plural": ({"target": {"images": "file"}}, "target: unknown key 'images'; did you mean image"),
    "nothing to show": ({"target": {"instruction": "Say it well"}}, "target: expected a text, an image or a video among its keys"),
    "a number": ({"query": 5}, "query: expected a column, or some of text, image, video, instruction with theirs, got 5"),
    "a place without pictures": ({"query": {"text": "<|image_1|> {title}"}}, "query: its text says where a picture stands, and no column"),
    "a place without a picture": (
        {"target": {"text": "<|image_1|> {title}", "image": "object.none"}},
        "column 'object.none': empty, and the text says where its picture stands",
    ),
    "a column of a target of several": (
        {"target": {"text": "{title} {list}"}, "negatives": "title"},
        "negatives: expected {text: ..., image: ...}, since the target is made of several columns",
    ),
}


@pytest.mark.parametrize("case", OF_COLUMNS)
def test_what_columns_cannot_be_is_refused_by_name(tmp_path, case):
    told, said = OF_COLUMNS[case]
    row = {"title": "shoe", "file": "a.png", "list": ["a"], "object": {"n": 5, "url": "https://x.org/a.png", "nul": "a\0b", "none": None}}
    with pytest.raises(ValueError, match=said) as caught:
        sides(tmp_path, row, **{"query": "title", "target": {"image": "file"}} | told)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
