"""Rows, pictures and task files of another shape: refused by file and row, told and counted, or right; never waited for without end."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command_line import assert_refused, assert_runs
from tests.helpers.evaluation_layouts import StubModel, documents, mmeb, parquet, picture
from tests.helpers.tiny_models import BUILDERS
from vlm2vec.data.mmeb import write_train
from vlm2vec.evaluation.runner import Options, run_tasks
from vlm2vec.evaluation.tasks import find_tasks

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data_files") / "model"
    folder.mkdir()
    BUILDERS["qwen2_vl"](folder)
    return folder


# -- rows for `vlm2vec embed` ---------------------------------------------------------------------------------------------------

# the second of two lines -> what the message names besides the file
LINES = {
    "null": ("null", "line 2"),
    "a number": ("3", "line 2"),
    "a list": ('["a"]', "line 2"),
    "true": ("true", "line 2"),
    "half": ('{"text": "a', "line 2"),
    "two objects": ('{"text": "a"} {"text": "b"}', "line 2"),
    "deep": (DEEP, "line 2"),
    "a deep value": ('{"text": ' + "[" * 100_000, "line 2"),
    "a text that is a number": ('{"text": 5}', "text"),
    "a list of texts with a number": ('{"text": ["a", 5]}', "text"),
    "an instruction that is a number": ('{"text": "a", "instruction": 5}', "instruction"),
    "no keys": ("{}", "input 1"),
    "an unknown key": ('{"txt": "a"}', "txt"),
    "a picture that is a number": ('{"image": 5}', "image"),
    "a picture that is true": ('{"image": true}', "image"),
    "a picture that is an object": ('{"image": {"a": 1}}', "image"),
    "pictures with a null": ('{"image": [null]}', "image"),
    "a picture with a NUL": ('{"image": "a\\u0000b"}', "image"),
    "a picture of a long name": (json.dumps({"image": "x" * 5000}), "image"),
    "a picture that is a folder": ('{"image": "."}', "image"),
    "a picture that is nothing": ('{"image": "gone.png"}', "gone.png"),
    "a film that is a number": ('{"video": 5}', "video"),
    "a film of no frames": ('{"video": []}', "input 1"),
    "a film of numbers": ('{"video": [[1, 2]]}', "video"),
    "a number of too many digits": ('{"text": "a", "key": ' + "9" * 5000 + "}", "line 2"),
    "not a number": ('{"text": NaN}', "text"),
    "a picture from the web": ('{"image": "https://example.org/a.png"}', "image"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", LINES)
def test_a_row_of_another_shape(model, tmp_path, capsys, case):
    line, name = LINES[case]
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    assert_refused(capsys, ["embed", model, tmp_path / "rows.jsonl", "-o", tmp_path / "out.safetensors", "--device", "cpu"], name)


FILES = {
    "Latin-1": b'{"text": "\xe9"}\n',
    "UTF-16": '{"text": "a"}\n'.encode("utf-16"),
    "zeros": bytes(64),
    "empty": b"",
    "blank": b"\n \n",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_rows(model, tmp_path, capsys, case):
    (tmp_path / "rows.jsonl").write_bytes(FILES[case])
    words = ["embed", model, tmp_path / "rows.jsonl", "-o", tmp_path / "out.safetensors", "--device", "cpu"]
    assert_refused(capsys, words, "rows.jsonl")


def test_a_mark_of_byte_order_in_front_is_no_text(model, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert_runs(capsys, ["embed", model, tmp_path / "rows.jsonl", "-o", tmp_path / "out.safetensors", "--device", "cpu"])


# -- pictures that are no files ----------------------------------------------------------------------------------------------------


def fifo(path):
    os.mkfifo(path)


def loop(path):
    path.symlink_to(path)


def socket_file(path):
    import socket

    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


PLACES = {
    "FIFO": fifo,
    "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "/dev/random": lambda path: path.symlink_to("/dev/random"),
    "a socket": socket_file,
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "a link to itself": loop,
    "empty": lambda path: path.touch(),
    "a text": lambda path: path.write_text("no picture"),
    "memory of a process": lambda path: path.symlink_to("/proc/self/mem"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_picture_or_film_that_is_no_file(model, tmp_path, capsys, place, kind):
    name = "x.png" if kind == "image" else "x.mp4"
    PLACES[place](tmp_path / name)
    (tmp_path / "rows.jsonl").write_text(json.dumps({kind: name}))
    assert_refused(capsys, ["embed", model, tmp_path / "rows.jsonl", "-o", tmp_path / "o.safetensors", "--device", "cpu"], name)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("place", PLACES)
def test_an_evaluation_tells_and_counts_it(tmp_path, place):
    data, images = mmeb(tmp_path, rows=8)
    broken = images / "ImageNet-1K" / "3.png"
    broken.unlink()
    PLACES[place](broken)
    (row,) = run_tasks(StubModel(), find_tasks(data), data, images, tmp_path / "out", options=Options(progress=False))
    assert row["problems"]["affected_rows"] == 1 and "3.png" in str(row["problems"])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", PLACES)
def test_training_leaves_the_row_out(tmp_path, place):
    from train.data.rows import PairDataset
    from train.recipe.schema import Data
    from vlm2vec.checkpoint.pretrained import describe

    BUILDERS["qwen2_vl"](tmp_path)
    PLACES[place](tmp_path / "x.png")
    write_train(tmp_path, "T", [{"qry": "<|image_1|> q", "qry_image_path": "x.png", "pos_text": "a", "pos_image_path": ""}])
    data = Data(root=str(tmp_path), images=str(tmp_path), sources=[])
    from train.recipe.schema import Source

    data.sources = [Source("T")]
    sample = PairDataset(data, describe(str(tmp_path)).processing)[0, 0]
    assert "T, row 0" in sample["error"] and "x.png" in sample["error"]


# -- annotations -------------------------------------------------------------------------------------------------------------------------

ROW = {"qry_text": "what?", "qry_img_path": "", "tgt_text": ["a", "b"], "tgt_img_path": ["", ""]}
NULLS = ["null", "3", "[]", '"a"', "true", DEEP, '{"qry_text": ' + DEEP]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("line", NULLS, ids=lambda line: line[:8])
@pytest.mark.parametrize("first", [True, False])
def test_annotations_with_a_line_that_is_no_row(tmp_path, line, first):
    """In a process of its own: a reader that ends the process with a segmentation fault must not take the others along."""
    (tmp_path / "eval" / "Task").mkdir(parents=True)
    lines = [line, json.dumps(ROW)] if first else [json.dumps(ROW), line]
    (tmp_path / "eval" / "Task" / "test.jsonl").write_text("\n".join(lines) + "\n")
    code = (
        "from vlm2vec.evaluation.tasks import find_tasks; from vlm2vec.evaluation.loaders import load_task; import sys\n"
        "try:\n  [load_task(t, sys.argv[1], '.') for t in find_tasks(sys.argv[1])]\nexcept ValueError as e: print(e); sys.exit(2)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "eval")], capture_output=True, text=True)
    assert ended.returncode == 2, (ended.returncode, ended.stderr[-300:])
    assert "test.jsonl" in ended.stdout and f"line {1 if first else 2}" in ended.stdout and len(ended.stdout) < 500


@pytest.mark.timeout(60)
@pytest.mark.parametrize("line", ["null", "3", "[]"])
def test_training_rows_with_a_line_that_is_no_row(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text('{"qry": "a"}\n' + line + "\n")
    code = (
        "import sys; from train.data.sources import open_source; from train.recipe.schema import Data, Source\n"
        "try:\n  open_source(Data(root=sys.argv[1], images='.'), Source('rows', file='rows.jsonl'))\n"
        "except ValueError as e: print(e); sys.exit(2)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == 2, (ended.returncode, ended.stderr[-300:])
    assert "rows.jsonl" in ended.stdout and "line 2" in ended.stdout


# columns of an MMEB evaluation table -> what is named
TABLES = {
    "texts that are numbers": ({"qry_text": [5, 6]}, "qry_text"),
    "texts that are lists": ({"qry_text": [["a"], ["b"]]}, "qry_text"),
    "candidates that are texts": ({"tgt_text": ["a", "b"]}, "tgt_text"),
    "candidates that are numbers": ({"tgt_text": [[1, 2], [3, 4]]}, "tgt_text"),
    "candidates that are null": ({"tgt_text": [None, None]}, "tgt_text"),
    "lists of other lengths": ({"tgt_text": [["a"], ["b"]]}, "tgt_text"),
    "pictures that are numbers": ({"qry_img_path": [1, 2]}, "qry_img_path"),
    "no column": ({"qry_text": None}, "qry_text"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", TABLES)
def test_a_table_of_another_shape(tmp_path, case):
    changes, name = TABLES[case]
    columns = {key: [value, value] for key, value in ROW.items()} | changes
    parquet(tmp_path / "Task" / "test-00000.parquet", **{key: value for key, value in columns.items() if value is not None})
    with pytest.raises(ValueError) as refused:
        run_tasks(StubModel(), find_tasks(tmp_path), tmp_path, tmp_path, tmp_path / "out", options=Options(progress=False))
    assert name in str(refused.value) and len(str(refused.value)) < 500


PARQUETS = {"empty": b"", "zeros": bytes(1000), "cut": None, "a text": b"PAR1 no parquet PAR1"}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", PARQUETS)
def test_a_table_that_is_none(tmp_path, case):
    path = tmp_path / "Task" / "test-00000.parquet"
    parquet(path, **{key: [value] for key, value in ROW.items()})
    path.write_bytes(path.read_bytes()[:-30] if PARQUETS[case] is None else PARQUETS[case])
    with pytest.raises(ValueError, match="test-00000.parquet"):
        run_tasks(StubModel(), find_tasks(tmp_path), tmp_path, tmp_path, tmp_path / "out", options=Options(progress=False))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("column", ["query-id", "corpus-id", "score"])
def test_relevance_that_fits_nothing(tmp_path, column):
    documents(tmp_path, pages=4, queries=3)
    path = next((tmp_path / "ViDoRe_arxivqa" / "qrels").rglob("*.parquet"), None) if (tmp_path / "ViDoRe_arxivqa").is_dir() else None
    if path is None:
        path = next(tmp_path.rglob("qrels/*.parquet"))
    import pyarrow.parquet as pq

    table = pq.read_table(path).to_pydict()
    if column not in table:
        pytest.skip(f"columns are {list(table)}")
    table[column] = ["nonsense"] * len(table[column])
    parquet(path, **table)
    root = path.parents[2]
    try:
        rows = run_tasks(StubModel(), find_tasks(root), root, tmp_path, tmp_path / "out", options=Options(progress=False))
    except ValueError as refused:
        assert len(str(refused)) < 500 and (column in str(refused) or "qrels" in str(refused))
    else:
        assert column != "score" and rows[0]["problems"]["affected_rows"] == rows[0]["num_queries"]


# -- task files ------------------------------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
TASKS = {
    "null": "null",
    "a list": "- name: a",
    "tasks null": "tasks: null",
    "tasks of numbers": "tasks: [1, 2]",
    "a task without a name": "tasks: [{loader: mmeb}]",
    "a task named null": "tasks: [{name: null}]",
    "a task named by a list": "tasks: [{name: [a]}]",
    "a metric that is a number": "tasks: [{name: a, metric: 3}]",
    "a metric unknown": "tasks: [{name: a, metric: nope@1}]",
    "a metric of no rank": "tasks: [{name: a, metric: hit@0}]",
    "a metric absurd": "tasks: [{name: a, metric: 'hit@99999999999999999999'}]",
    "options a list": "tasks: [{name: a, options: [1]}]",
    "hub a text": "tasks: [{name: a, hub: b}]",
    "a loader unknown": "tasks: [{name: Task, loader: nope}]",
    "a loader that is a list": "tasks: [{name: Task, loader: [mmeb]}]",
    "a prompt that is a number": "tasks: [{name: Task, query_prompt: 5}]",
    "a key unknown": "tasks: [{name: a, prompt: b}]",
    "anchors": BOMB + "tasks: *a8",
    "a task of anchors": BOMB + "tasks: [{name: a, options: *a8}]",
    "an object": "tasks: !!python/object/apply:os.system ['true']",
    "two of one name": "tasks: [{name: a}, {name: a}]",
    "a name that leaves": "tasks: [{name: ../a}]",
    "deep": "tasks: " + "[" * 20_000,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", TASKS)
def test_a_task_file_of_another_shape(tmp_path, capsys, case):
    mmeb(tmp_path, name="Task", rows=3)
    (tmp_path / "own.yaml").write_text(TASKS[case])
    words = ["eval", "gone", "--data", tmp_path / "eval", "--output", tmp_path / "out", "--tasks", tmp_path / "own.yaml"]
    assert_refused(capsys, words)
    from tests.helpers.command_line import call

    assert "gone" not in call(capsys, *words)[2].replace(str(tmp_path), ""), "refused before the model is looked for"


HINTS = [
    "[1]",
    "[null]",
    '["a"]',
    "3",
    '"a"',
    '{"Task": 5}',
    '{"Task": [1]}',
    '{"Task": {"metric": 5}}',
    DEEP,
    '{"tasks": [5]}',
    '{"Task": ',
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("content", HINTS, ids=lambda text: text[:20])
def test_hints_of_another_shape(tmp_path, content):
    data, _ = mmeb(tmp_path, name="Task", rows=3)
    (data / "tasks.json").write_text(content)
    with pytest.raises(ValueError) as refused:
        find_tasks(data)
    assert len(str(refused.value)) < 500 and ("tasks.json" in str(refused.value) or "Task" in str(refused.value))


# -- numbers on the command line --------------------------------------------------------------------------------------------------------

OPTIONS = {
    "--batch-size": ["0", "-1", "x", "1.5"],
    "--truncate-dim": ["0", "-1", "33", "99999999999999999999"],
    "--dtype": ["banana", "8", "int8"],
    "--device": ["banana", "cuda:99", "-1"],
    "--attn": ["banana"],
    "--option": [
        "max_pixels",
        "max_pixels=-1",
        "max_pixels=1e400",
        "max_pixels=" + "9" * 60,
        "min_pixels=2000000000",
        "frames=0",
        "frames=null",
        "positions=3",
        "resolution=[0,5]",
        "resolution=[1,2,3]",
        "max_length=true",
        "max_length=" + "[" * 5000,
        "=3",
        "max_image_pixels=0",
    ],
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("option", "value"), [(o, v) for o, values in OPTIONS.items() for v in values], ids=lambda v: v[:24])
def test_an_option_out_of_its_range(model, tmp_path, capsys, option, value):
    words = ["embed", model, "--text", "a", "-o", tmp_path / "o.safetensors", "--device", "cpu", option, value]
    assert_refused(capsys, words)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("words", [["-k", "0"], ["-k", "-5"], ["-k", "x"], ["--batch-size", "0"]], ids=" ".join)
def test_search_with_absurd_numbers(model, tmp_path, capsys, words):
    picture(tmp_path / "pictures" / "a.png", 1)
    assert_refused(capsys, ["search", model, "a fox", "--images", tmp_path / "pictures", "--device", "cpu", *words])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("k", ["1000000", "9" * 30])
def test_search_for_more_than_there_are(model, tmp_path, capsys, k):
    picture(tmp_path / "pictures" / "a.png", 1)
    out, _ = assert_runs(capsys, ["search", model, "a fox", "--images", tmp_path / "pictures", "--device", "cpu", "-k", k])
    assert len(out.splitlines()) == 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "words", [["--top", "0"], ["--workers", "0"], ["--workers", "1000000"], ["--batch-size", "0"], ["--top", "9" * 30]]
)
def test_evaluation_with_absurd_numbers(model, tmp_path, capsys, words):
    mmeb(tmp_path, rows=3)
    base = ["eval", model, "--data", tmp_path / "eval", "--images", tmp_path / "images", "--output", tmp_path / "out", "--device", "cpu"]
    assert_refused(capsys, [*base, *words], words[0])


def test_pixels_of_one_row_and_of_one_column_are_pictures(model, tmp_path, capsys):
    for name, shape in (("row.png", (1, 300, 3)), ("column.png", (300, 1, 3)), ("dot.png", (1, 1, 3))):
        Image.fromarray(np.zeros(shape, dtype=np.uint8)).save(tmp_path / name)
    names = [tmp_path / name for name in ("row.png", "column.png", "dot.png")]
    assert_runs(capsys, ["embed", model, *names, "-o", tmp_path / "o.safetensors", "--device", "cpu"])
