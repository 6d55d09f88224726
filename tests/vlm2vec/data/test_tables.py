"""Files as people have them: encodings, marks, separators, cut and mixed-up lines, folders of every kind; right, or refused by name."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from vlm2vec.data.tables import csv_files, open_table


def table(path, content, **options):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_table(str(path), **options)


def all_rows(opened):
    return [opened[row] for row in range(len(opened))]


ROWS = [{"a": "é", "b": "1,5"}, {"a": "x\ny", "b": ""}, {"a": "007", "b": "NA"}]
BODY = 'a,b\né,"1,5"\n"x\ny",\n007,NA\n'
CSVS = {
    "UTF-8": (BODY.encode(), {}),
    "UTF-8 with a mark": (BODY.encode("utf-8-sig"), {}),
    "UTF-16": (BODY.encode("utf-16"), {}),
    "UTF-16 without a mark": (BODY.encode("utf-16-le"), {"encoding": "utf-16-le"}),
    "Windows' letters": (BODY.encode("cp1252"), {"encoding": "cp1252"}),
    "Windows' lines": (BODY.replace("\n", "\r\n").replace("x\r\ny", "x\ny").encode(), {}),
    "semicolons": ('a;b\né;1,5\n"x\ny";\n007;NA\n'.encode(), {}),
    "semicolons, many commas": ('a;"b"\né;1,5\n"x\ny";\n007;NA\n'.encode(), {"wanted": ["a", "b"]}),
    "tabs": ('a\tb\né\t1,5\n"x\ny"\t\n007\tNA\n'.encode(), {}),
    "said bars": ('a|b\né|1,5\n"x\ny"|\n007|NA\n'.encode(), {"delimiter": "|"}),
    "blanks in the names": (BODY.replace("a,b", "a , b").encode(), {}),
    "empty lines": ("\n\n" + BODY + "\n\n").encode(),
}
CSVS = {name: told if isinstance(told, tuple) else (told, {}) for name, told in CSVS.items()}


@pytest.mark.parametrize("case", CSVS)
@pytest.mark.parametrize("large", [False, True], ids=["whole", "laid out"])
def test_csv_cells_are_texts_as_they_stand(tmp_path, monkeypatch, case, large):
    if large:
        monkeypatch.setattr(csv_files, "IN_MEMORY", 0)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    content, options = CSVS[case]
    opened = table(tmp_path / "rows.csv", content, **options)
    assert opened.column_names == ["a", "b"] and all_rows(opened) == ROWS and opened.left_out == ()
    assert opened.media == str(tmp_path)
    assert all_rows(pickle.loads(pickle.dumps(opened))) == ROWS
    assert bool(list(tmp_path.glob("cache/vlm2vec/*.arrow"))) == large


def test_the_separator_is_the_one_under_which_the_columns_are_there(tmp_path):
    head = "title, in short;price, in euro;file\nshoe;5,0;a.png\n"
    assert table(tmp_path / "rows.csv", head, wanted=["file"])[0] == {"title, in short": "shoe", "price, in euro": "5,0", "file": "a.png"}


@pytest.mark.parametrize("large", [False, True], ids=["whole", "laid out"])
def test_lines_of_another_number_of_cells_are_named_and_left_out(tmp_path, monkeypatch, large):
    if large:
        monkeypatch.setattr(csv_files, "IN_MEMORY", 0)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    opened = table(tmp_path / "rows.csv", "a,b\n1,2\n3\n4,5,6\n7,8\n")
    assert all_rows(opened) == [{"a": "1", "b": "2"}, {"a": "7", "b": "8"}]
    assert opened.left_out == (
        "rows.csv, line 3: 1 cells, expected the 2 of the first line, in '3'",
        "rows.csv, line 4: 3 cells, expected the 2 of the first line, in '4,5,6'",
    )


def test_lines_are_the_files_own(tmp_path):
    """Cells of several lines, empty lines, every kind of line end; a file whose last row is left out behind such a cell is whole."""
    body = '\nfile,cap\na,"two\nlines"\n\nb,x\nc,x,EXTRA\n"d","1\n2\n""3"""\ne\n'
    for name, content in (("n.csv", body), ("rn.csv", body.replace("\n", "\r\n")), ("utf16.csv", body.encode("utf-16"))):
        opened = table(tmp_path / name, content)
        assert [row["file"] for row in all_rows(opened)] == ["a", "b", "d"]
        assert [line.split(",")[1] for line in opened.left_out] == [" line 7: 3 cells", " line 11: 1 cells"], name
        assert opened.left_out[0].endswith("in 'c,x,EXTRA'")
    opened = table(tmp_path / "long.csv", f'a,b\n"{"x" * 200_000}",1\n2\n')  # beyond what Python's reader takes
    assert opened.left_out == ("long.csv, row 3: 1 cells, expected the 2 of the first line, in '2'",)


@pytest.mark.parametrize("large", [False, True], ids=["whole", "laid out"])
@pytest.mark.parametrize("body", [",a,b\n0,x,1\n1,y,2\n", "a,b,\nx,1,\ny,2,\n", "a,b,,\nx,1,,\ny,2,,\n", ",a, ,b\n,x,,1\n,y,,2\n"])
def test_columns_without_a_name_are_none(tmp_path, monkeypatch, large, body):
    """The index that pandas writes, a comma at the end of each line, both."""
    if large:
        monkeypatch.setattr(csv_files, "IN_MEMORY", 0)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    opened = table(tmp_path / "rows.csv", body)
    assert opened.column_names == ["a", "b"] and opened.left_out == () and opened.repeated <= {""}
    assert all_rows(opened.select_columns(["a", "b"])) == [{"a": "x", "b": "1"}, {"a": "y", "b": "2"}]
    with pytest.raises(ValueError, match="no column '', the data has a, b;"):
        opened.top("")


def test_repeated_names_are_refused_where_they_are_used(tmp_path):
    opened = table(tmp_path / "rows.csv", "a,b,b\n1,2,3\n")
    assert opened.value(opened[0], "a") == "1"
    with pytest.raises(ValueError, match="2 columns are named 'b'; rename all but one"):
        opened.top("b")


REFUSED = {
    "empty": ("x.csv", b"", {}, "is empty"),
    "zeros": ("x.csv", "a,b\n1,2\n".encode("utf-16-le"), {}, "bytes that are 0; say encoding: utf-16-le"),
    "Latin-1": ("x.csv", b"a,b\nok,1\n\xe9,2\n", {}, "expected text in utf-8, got byte 9 that is none.*say encoding: cp1252"),
    "an unknown encoding": ("x.csv", b"a,b\n", {"encoding": "utf-9"}, "encoding 'utf-9' is unknown"),
    "another encoding": ("x.csv", b"a\n\x81\n", {"encoding": "cp1252"}, "expected text in cp1252"),
    "a quote without its other": ("x.csv", b'a,b\n1,2\n3,"4\n5,6\n7,8\n', {}, "a quote in its last rows is never closed"),
    "a quote before the last cell": ("x.csv", b'a,b\n1,2\n"3,4\n5,6\n7,8\n', {}, "a quote in its last rows is never closed"),
    "a long delimiter": ("x.csv", b"a,b\n", {"delimiter": ";;"}, "delimiter must be one character"),
    "a delimiter of JSON": ("x.jsonl", b'{"a": 1}\n', {"delimiter": ";"}, "encoding and delimiter are of CSV files"),
    "a split of a file": ("x.csv", b"a\n1\n", {"split": "train"}, "is a file and has no split"),
    "another ending": ("x.xlsx", b"PK", {}, "expected files of one ending of .csv, .tsv, .json"),
    "no parquet": ("x.parquet", b"PAR1 or not", {}, "x.parquet cannot be read as parquet"),
    "no tar": ("x.tar", b"no tar" * 200, {}, "x.tar cannot be read as a tar file|x.tar: no samples"),
    "a compressed tar": ("x.tar", b"\x1f\x8b" + bytes(100), {}, "is compressed .*: decompress it"),
    "JSON of nothing": ("x.json", b"  \n", {}, "is empty"),
    "JSON of a number": ("x.json", b"[1, 2", {}, "x.json"),
    "JSON of several lists": ("x.json", b'{\n"a": [{"b": 1}],\n "c": [{"d": 1}]}', {}, "an object with 2 lists of objects"),
    "UTF-16 JSON": ("x.jsonl", '{"a": 1}'.encode("utf-16"), {}, "UTF-16; save it as UTF-8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path, case):
    name, content, options, said = REFUSED[case]
    with pytest.raises(ValueError, match=said) as caught:
        table(tmp_path / name, content, **options)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value) and name in str(caught.value)


def test_a_folder_or_name_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("captions.csv", "./here", str(tmp_path / "gone")):
        with pytest.raises(ValueError, match=f"no such file or folder as {name} .in {tmp_path}.; mend path"):
            open_table(name)
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match="here: no table in this folder"):
        open_table("here")
    (tmp_path / "here" / "rows.csv").write_text("a\n1\n")
    with pytest.raises(ValueError, match="name the file: path: .*here/rows.csv"):
        open_table("here")


def test_json_lines_keep_the_rows_that_are_none(tmp_path):
    body = '\ufeff{"a": "\\ud83d", "b": {"c": 1}}\n\n  \r\nnull\n{"a": 2\n{"z": 1}\r\n{"a": "last\\n\u2028"}'
    opened = table(tmp_path / "rows.jsonl", body)
    assert len(opened) == 5 and opened.column_names == ["a", "b", "z"]
    assert opened[0] == {"a": "\ufffd", "b": {"c": 1}} and opened.value(opened[0], "b.c") == 1
    assert opened[4] == {"a": "last\n\u2028"} and opened.value(opened[4], "b.c") is None
    for row, said in ((1, "rows.jsonl, line 4: expected an object of column: value, got null"), (2, "rows.jsonl, line 5: not JSON")):
        with pytest.raises(ValueError, match=said):
            opened[row]


def test_lists_of_rows_in_one_value(tmp_path):
    for body in ('[{"a": 1}, {"a": 2}]', '[\n{"a": 1},\n{"a": 2}\n]', '{\n "info": {"n": 2},\n "rows": [{"a": 1}, {"a": 2}]\n}'):
        assert all_rows(table(tmp_path / "rows.json", body)) == [{"a": 1}, {"a": 2}], body
    assert all_rows(table(tmp_path / "rows.json", '{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}], "JSON lines under another name"


def test_columns_that_come_late_are_found(tmp_path, monkeypatch):
    first = '{"a": "late", "b": {"c": 1}}\n' * 1200
    body = first + '{"a": "x", "late": "here"}\n{"ärmel": 1, "c\\"d": 2, "e": {"deep": 3}}\n{"\\u00fcber": 4}\n'
    opened = table(tmp_path / "rows.jsonl", body)
    assert opened.column_names == ["a", "b"]
    for row, name, value in ((1200, "late", "here"), (1201, "ärmel", 1), (1201, 'c"d', 2), (1201, "e.deep", 3), (1202, "über", 4)):
        assert opened.has(name) and opened.value(opened[row], name) == value and opened.value(opened[0], name) is None
    for name in ("deep", "here", "c", "x" * 200):
        assert not opened.has(name)
        with pytest.raises(ValueError, match="no column"):
            opened.top(name)
    assert opened.column_names == ["a", "b", "late", "ärmel", 'c"d', "e", "über"]
    assert table(tmp_path / "rows.json", json.dumps([{"a": 1}] * 1200 + [{"late": 2}])).column_names == ["a", "late"]
    (tmp_path / "few.jsonl").write_text('{"z": 1}\n')
    both = open_table(str(tmp_path / "*.jsonl"))
    assert both.column_names == ["z", "a", "b"] and both.has("late") and both[1] == {"a": "late", "b": {"c": 1}}, "keys are each row's own"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tar = tar_of(tmp_path / "s.tar", [(f"{i}.txt", b"x") for i in range(150)] + [("150.txt", b"y"), ("150.second.jpg", b"J")])
    assert open_table(str(tar)).column_names == ["__key__", "txt", "second.jpg"]


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, body in files:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def test_shards_are_found_once_and_read_by_number(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tar_of(tmp_path / "s-00.tar", [("a/1.TXT", b"one"), ("a/1.seg.png", b"S"), ("a/1.json", b'{"n": {"m": 5}}'), ("__meta__.json", b"{}")])
    tar_of(tmp_path / "s-01.tar", [(f"b/{'long' * 60}.txt", b"\xef\xbb\xbftwo"), ("b/3.txt", b"\xff"), ("b/4.json", b"{"), ("5.png", b"P")])
    opened = open_table(str(tmp_path / "s-{00..01}.tar"))
    assert opened.column_names == ["__key__", "txt", "seg.png", "json", "png"] and len(opened) == 5
    assert opened[0] == {"__key__": "a/1", "txt": "one", "seg.png": b"S", "json": {"n": {"m": 5}}}
    assert opened.value(opened[0], "json.n.m") == 5 and opened.value(opened[0], "seg.png") == b"S"
    assert opened[1]["txt"] == "two"
    assert opened.select_columns(["json.n"])[0] == {"__key__": "a/1", "json": {"n": {"m": 5}}}
    for row, said in ((2, "s-01.tar, b/3.txt is not UTF-8 text"), (3, "s-01.tar, b/4.json: not JSON")):
        with pytest.raises(ValueError, match=said):
            opened[row]
    monkeypatch.setattr("vlm2vec.data.tables.shards._members", None)  # not walked through again
    assert pickle.loads(pickle.dumps(open_table(str(tmp_path / "*.tar"))))[4] == {"__key__": "5", "png": b"P"}
    with pytest.raises(ValueError, match="there is no .*s-02.tar"):
        open_table(str(tmp_path / "s-{00..02}.tar"))


def test_a_shard_that_is_cut_off_keeps_its_whole_samples(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tar_of(tmp_path / "s.tar", [("1.txt", b"one"), ("2.txt", b"2" * 5000)])
    path.write_bytes(path.read_bytes()[:3000])
    opened = open_table(str(path))
    assert len(opened) == 2 and opened[0]["txt"] == "one"
    with pytest.raises(ValueError, match="s.tar, 2.txt: the shard is cut off; copy it again"):
        opened[1]


def picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 30), (shade,) * 3).save(path)


def test_folders_of_pictures(tmp_path):
    for name in ("b/10.png", "b/9.png", "a/1.png"):
        picture(tmp_path / "classes" / name, 9)
    opened = open_table(str(tmp_path / "classes"))
    assert [(row["image"].rpartition("/")[2], row["label"]) for row in all_rows(opened)] == [
        ("1.png", "a"),
        ("9.png", "b"),
        ("10.png", "b"),
    ]
    for split in ("train", "test"):
        picture(tmp_path / "splits" / split / "x.png", 1)
        (tmp_path / "splits" / split / "metadata.jsonl").write_text(
            json.dumps({"file_name": "x.png", "mask_file_name": "m.png", "of": split})
        )
    opened = open_table(str(tmp_path / "splits"))
    assert opened[0] == {"image": "x.png", "mask": "m.png", "file_name": "x.png", "mask_file_name": "m.png", "of": "train"}
    assert opened.media == str(tmp_path / "splits" / "train")
    assert open_table(str(tmp_path / "splits"), split="test")[0]["of"] == "test"
    with pytest.raises(ValueError, match="no split 'dev'; it has test, train"):
        open_table(str(tmp_path / "splits"), split="dev")


def test_tables_of_datasets(tmp_path):
    import datasets

    features = datasets.Features({"label": datasets.ClassLabel(names=["cat", "dog"]), "views": datasets.List(datasets.Image())})
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    body = (tmp_path / "p.png").read_bytes()
    made = datasets.Dataset.from_list([{"label": 1, "views": [{"bytes": body, "path": None}] * 2}], features=features)
    datasets.DatasetDict({"a": made, "b": made}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="no split train; it has a, b: say split: a"):
        open_table(str(tmp_path / "saved"))
    row = open_table(str(tmp_path / "saved"), split="b")[0]
    assert row["label"] == "dog" and [view["bytes"] for view in row["views"]] == [body] * 2


def hub_folder(folder, rows):
    import datasets

    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: shop\n  data_files: data/train-*.parquet\n---\n")
    datasets.Dataset.from_list(rows).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return all_rows(open_table(str(folder), config="shop"))


def test_a_folder_like_the_hubs_is_read_as_it_is_now(tmp_path, monkeypatch):
    """Another one of its name and configuration, and one whose rows changed: `datasets` alone gives the rows that it saw first."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for folder, word in (("one", "first"), ("two", "other"), ("one", "again")):
        assert hub_folder(tmp_path / folder / "hub", [{"a": word}]) == [{"a": word}]


def test_small_parquet_is_read_in_place_and_large_one_says_where_its_copy_lies(tmp_path, monkeypatch, caplog):
    import datasets

    from vlm2vec.data.tables import arrow

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"label": datasets.ClassLabel(names=["cat", "dog"]), "image": datasets.Image(decode=False)})
    rows = [{"label": i % 2, "image": {"bytes": bytes([i]) * 100, "path": None}} for i in range(30)]
    for part in range(2):
        datasets.Dataset.from_list(rows[part * 15 :][:15], features=features).to_parquet(tmp_path / f"{part}.parquet", batch_size=4)
    small = all_rows(open_table(str(tmp_path / "*.parquet")))
    assert [row["label"] for row in small] == ["cat", "dog"] * 15 and small[29]["image"]["bytes"] == bytes([29]) * 100
    assert not list(tmp_path.glob("cache/**/*.arrow")) and not caplog.records
    monkeypatch.setattr(arrow, "IN_MEMORY", 0)
    monkeypatch.setattr(arrow, "_TOLD", 1)
    assert all_rows(open_table(str(tmp_path / "*.parquet"))) == small
    assert list(tmp_path.glob("cache/**/*.arrow")) and f"second copy in {tmp_path / 'cache'}" in caplog.text
