"""MMEB's files: what is written is read back, the hub's naming is understood, and every fault is named."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm2vec.data import mmeb

TRAIN = [
    dict(qry="<|image_1|>\nName it\n", qry_image_path="a/cat.png", pos_text="cat", pos_image_path="", neg_text="dog", neg_image_path=""),
    dict(qry="a cat\n", qry_image_path="", pos_text="<|image_1|>\nRepresent\n", pos_image_path="a/cat.png"),
]
EVAL = [
    dict(qry_text="<|image_1|>\nName it\n", qry_img_path="a/cat.png", tgt_text=["cat", "dog"], tgt_img_path=["", ""]),
    dict(qry_text="a cat\n", qry_img_path="", tgt_text=["<|image_1|>\nRepresent\n"] * 2, tgt_img_path=["a/cat.png", "a/dog.png"]),
]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    for name in ("cat", "dog"):
        (folder / "a" / f"{name}.png").write_bytes(b"any file: whether it is a picture shows when it is opened")
    return folder


def test_rows_come_back_as_written(tmp_path, images):
    mmeb.write_train(tmp_path, "Pets", TRAIN)
    mmeb.write_eval(tmp_path, "Pets", EVAL)
    train = mmeb.read_train(tmp_path, "Pets", image_root=images)
    assert train.column_names == list(mmeb.TRAIN_COLUMNS)
    assert train[:]["neg_text"] == ["dog", ""]  # a negative that was left out is the empty string
    assert [dict(row) for row in mmeb.read_eval(tmp_path, "Pets", image_root=images)] == EVAL
    assert mmeb.dataset_names(tmp_path, "test") == ["Pets"] and mmeb.dataset_names(tmp_path, "other") == []
    assert not list(tmp_path.rglob("*.part"))


def test_hub_shards_are_read_in_order(tmp_path):
    """The hub names shards test-00000-of-00002; the row of an error counts from the start of its own file."""
    mmeb.write_eval(tmp_path, "Pets", EVAL)
    first = tmp_path / "Pets" / "test-00000.parquet"
    pq.write_table(pq.read_table(first).slice(0, 1), tmp_path / "Pets" / "test-00000-of-00002.parquet")
    pq.write_table(pq.read_table(first).slice(1, 1), tmp_path / "Pets" / "test-00001-of-00002.parquet")
    first.unlink()
    assert mmeb.read_eval(tmp_path, "Pets")[:]["qry_text"] == [row["qry_text"] for row in EVAL]
    broken = pq.read_table(tmp_path / "Pets" / "test-00001-of-00002.parquet").to_pylist()
    broken[0]["tgt_text"] = ["only one"]
    pq.write_table(pa.Table.from_pylist(broken), tmp_path / "Pets" / "test-00001-of-00002.parquet")
    with pytest.raises(ValueError, match=r"test-00001-of-00002.parquet, row 0.*1 texts and 2 image paths"):
        mmeb.read_eval(tmp_path, "Pets")


def test_missing_negatives_are_empty(tmp_path):
    """Some sources were released without negative columns."""
    mmeb.write_train(tmp_path, "Pets", TRAIN)
    file = tmp_path / "Pets" / "original-00000.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["neg_text", "neg_image_path"]), file)
    assert mmeb.read_train(tmp_path, "Pets")[:]["neg_text"] == ["", ""]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qry": "", "qry_image_path": ""}, r"row 1, columns 'qry' and 'qry_image_path'.*no query"),
        ({"qry": "<|image_1|>\n"}, "no query"),  # a marker alone asks nothing
        ({"pos_text": " ", "pos_image_path": ""}, r"row 1, columns 'pos_text'.*no positive"),
        ({"pos_image_path": None}, r"row 1, column 'pos_image_path': is null"),
        ({"pos_image_path": "../secret.png"}, r"row 1, column 'pos_image_path'.*leaves the image folder"),
        ({"pos_image_path": "/etc/passwd"}, "leaves the image folder"),
        ({"pos_image_path": "a/gone.png"}, r"row 1, column 'pos_image_path': no image 'a/gone.png'"),
    ],
)
def test_faulty_training_rows_are_named(tmp_path, images, change, message):
    mmeb.write_train(tmp_path, "Pets", [TRAIN[0], {**TRAIN[1], **change}])
    with pytest.raises(ValueError, match=message):
        mmeb.read_train(tmp_path, "Pets", image_root=images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tgt_text": [], "tgt_img_path": []}, r"row 1.*no candidates, so no positive"),
        ({"tgt_text": ["", "dog"], "tgt_img_path": ["", ""]}, r"the positive \(candidate 0\) is empty"),
        ({"tgt_text": ["cat", ""], "tgt_img_path": ["", ""]}, "candidate 1 is empty"),
        ({"tgt_text": ["cat", None], "tgt_img_path": ["", ""]}, "candidate 1 is null"),
        ({"tgt_text": ["cat"], "tgt_img_path": ["", ""]}, "1 texts and 2 image paths"),
        ({"tgt_img_path": ["a/cat.png", "../dog.png"]}, "leaves the image folder"),
    ],
)
def test_faulty_evaluation_rows_are_named(tmp_path, images, change, message):
    mmeb.write_eval(tmp_path, "Pets", [EVAL[0], {**EVAL[1], **change}])
    with pytest.raises(ValueError, match=message):
        mmeb.read_eval(tmp_path, "Pets", image_root=images)


def test_faulty_files_are_named(tmp_path):
    mmeb.write_eval(tmp_path, "Pets", EVAL)
    file = tmp_path / "Pets" / "test-00000.parquet"
    whole = file.read_bytes()
    with pytest.raises(ValueError, match="found none; .* holds Pets"):
        mmeb.read_eval(tmp_path, "Plants")
    with pytest.raises(ValueError, match="does not exist"):
        mmeb.read_eval(tmp_path / "nowhere", "Pets")
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="test-00000.parquet: not a readable parquet file"):
        mmeb.read_eval(tmp_path, "Pets")
    file.write_bytes(whole)
    pq.write_table(pq.read_table(file).drop_columns(["tgt_img_path"]), file)
    with pytest.raises(ValueError, match="column 'tgt_img_path' is not there; expected .* got qry_text"):
        mmeb.read_eval(tmp_path, "Pets")
    pq.write_table(pa.table({**{c: ["x"] for c in ("qry_text", "qry_img_path", "tgt_img_path")}, "tgt_text": ["cat"]}), file)
    with pytest.raises(ValueError, match="'tgt_.*': expected lists of strings, got string"):
        mmeb.read_eval(tmp_path, "Pets")
    pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(ValueError, match="expected"):
        mmeb.read_eval(tmp_path, "Pets")


def test_items_for_the_model(tmp_path):
    assert mmeb.to_item("a\n", "x/y.png", tmp_path) == {"text": "a\n", "image": str(tmp_path / "x/y.png")}
    assert mmeb.to_item("a\n", "", tmp_path)["image"] is None
