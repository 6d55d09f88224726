"""Ids of any type: right, or refused by file and row; ViDoRe's three layouts, its languages, and labels that were mended."""

import json
from math import log2

import numpy as np
import pytest

from tests.helpers.angles import AngleModel
from tests.helpers.evaluation_layouts import parquet
from tests.helpers.v3_layouts import SECOND, documents, lines, page, table
from vlm2vec.evaluation.loaders import load_task
from vlm2vec.evaluation.loaders.ids import id_text, read_judgements
from vlm2vec.evaluation.loaders.rows import Held, open_rows, read_rows
from vlm2vec.evaluation.runner import Options, run_tasks
from vlm2vec.evaluation.tasks import find_tasks, known_tasks, load_tasks


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (7, "7"), (7.0, "7"), ("7", "7"), ("07", "07"), (" a", " a"), (-3, "-3"), (2**60, str(2**60))]
)
def test_ids_are_compared_as_text(value, text):
    assert id_text(value, "here") == text


@pytest.mark.parametrize(
    "value, told", [(None, "no id"), ("", "no id"), (0.5, "got 0.5"), (True, "got True"), ([1], r"got \[1\]"), (np.nan, "got nan")]
)
def test_what_is_no_id_is_refused_by_name(value, told):
    with pytest.raises(ValueError, match=f"queries.jsonl, row 3: .*{told}.*give each row its own"):
        id_text(value, "queries.jsonl, row 3")


def judgements(*rows):
    return read_judgements(Held(["qrels"], [[dict(zip(("query_id", "corpus_id", "score"), row)) for row in rows]]))


def test_judgements():
    assert judgements((0, 1, 2), ("0", "1", 1), (0, "x", 0), (0, 5, -1), (1, 2, "3")) == {"0": {"1": 1.0}, "1": {"2": 3.0}}
    assert judgements((0, 1, 2), (0, 1, 3)) == {"0": {"1": 3.0}}, "the last row of a pair holds"
    assert judgements((0, 1, 2), (0, 1, 0)) == {"0": {"1": 2.0}}, "rows of grade 0 go first"
    assert judgements((0, 1, None)) == {"0": {"1": 1.0}}
    for row, told in (
        ((None, 1, 1), "qrels, row 0: no id"),
        ((0, None, 1), "no id"),
        ((0, 1, "much"), "grade should be a number"),
        ((0, 1, float("nan")), "finite"),
    ):
        with pytest.raises(ValueError, match=told):
            judgements(row)


def texts(root, queries, corpus, qrels):
    """A text task of one's own in three files."""
    from vlm2vec.evaluation.tasks import make_task

    lines(root / "q.jsonl", *queries)
    lines(root / "c.jsonl", *corpus)
    lines(root / "r.jsonl", *qrels)
    options = {"queries": "q.jsonl", "corpus": "c.jsonl", "qrels": "r.jsonl"}
    words = {"query_prompt": "{text}", "target_prompt": "{text}"}
    return make_task({"name": "own", "modality": "text", "loader": "texts", "candidates": "global", "options": options, **words}, "here")


ASKED, KNOWN, JUDGED = [{"id": 0, "text": "angle:1"}], [{"id": 0, "text": "angle:2"}], [{"query-id": 0, "corpus-id": 0}]


@pytest.mark.parametrize(
    "name, rows",
    [("id", ASKED), ("_id", [{"_id": 0, "text": "angle:1"}]), ("query_id", [{"id": None, "query_id": "0", "query": "angle:1"}])],
)
def test_id_0_under_any_name(tmp_path, name, rows):
    loaded = load_task(texts(tmp_path, rows, KNOWN, JUDGED), tmp_path, tmp_path)
    assert loaded.names == ["0"] and loaded.labels == [[0]] and loaded.queries == [{"text": "angle:1"}]


@pytest.mark.parametrize(
    "queries, corpus, qrels, told",
    [
        ([{"text": "a"}], KNOWN, JUDGED, "q.jsonl, row 0: no id; expected one under _id, id, qid"),
        (ASKED, [*KNOWN, {"text": "b"}], JUDGED, "c.jsonl, row 1: no id; expected one under _id, id, doc_id"),
        (ASKED, KNOWN, [{"query-id": 0}], "r.jsonl, row 0: no id; expected one under corpus_id"),
        (ASKED, [{"id": 1.5, "text": "b"}], JUDGED, "c.jsonl, row 0: an id is a text or an integer, got 1.5"),
        ([None], KNOWN, JUDGED, "q.jsonl, row 0: expected an object"),
    ],
)
def test_missing_ids_are_refused_by_file_and_row(tmp_path, queries, corpus, qrels, told):
    task = texts(tmp_path, queries, corpus, qrels)
    with pytest.raises(ValueError, match=told):
        load_task(task, tmp_path, tmp_path)


def test_ids_that_stand_twice(tmp_path):
    """Of two candidates the first stands for its id; both queries are scored. Both are counted and neither is a fault of the score."""
    corpus = [{"id": "a", "text": "angle:10"}, {"id": "a", "text": "angle:90"}, {"id": 1, "text": "angle:50"}]
    queries = [{"id": 5, "text": "angle:12"}, {"id": "5", "text": "angle:88"}]
    task = texts(tmp_path, queries, corpus, [{"query_id": 5, "corpus_id": "a"}])
    (row,) = run_tasks(AngleModel(), [task], tmp_path, tmp_path, tmp_path / "out", options=Options(progress=False))
    assert row["metrics"]["hit@1"] == 0.5 and row["num_candidates"] == 2 and row["num_queries"] == 2
    told = row["problems"]
    assert told["affected_rows"] == 0 and told["duplicate_candidates"]["rows"] == 1 and told["duplicate_queries"]["rows"] == 2
    assert "c.jsonl, row 1: a" in told["duplicate_candidates"]["examples"][0]


def test_large_tables_are_read_from_their_files(tmp_path, monkeypatch):
    """A parquet file above the limit is mapped; lines and rows are the same by index as in order."""
    from vlm2vec.evaluation.loaders import rows as module

    table(tmp_path / "t.parquet", *({"id": i, "text": "x" * i} for i in range(300)))
    lines(tmp_path / "t.jsonl", *({"id": i, "text": "é" * i} for i in range(300)))
    task = load_tasks("v3")["text/BRIGHT/aops"]
    held = open_rows(tmp_path, task, "t.parquet", "rows")
    monkeypatch.setattr(module, "HELD_BYTES", 10)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    mapped, placed = open_rows(tmp_path, task, "t.parquet", "rows"), open_rows(tmp_path, task, "t.jsonl", "rows")
    assert list(mapped) == list(held) == [mapped[i] for i in range(300)]
    assert list(placed) == [placed[i] for i in range(300)] and placed[299]["text"] == "é" * 299
    with pytest.raises(ValueError, match="task text/BRIGHT/aops: no rows in .*; expected gone-\\*.parquet, none.csv there"):
        open_rows(tmp_path, task, ["gone-*.parquet", "none.csv"], "rows")


# -- ViDoRe -----------------------------------------------------------------------------------------------------------------------


def vidore_v3(root, folder="vidore_v3_hr"):
    """ViDoRe V3's own layout: underscores, integer ids, a row a language, grades 1 and 2, a table of metadata beside."""
    base = root / folder
    parquet(base / "corpus" / "test-00000.parquet", corpus_id=[0, 1, 2], image=[page(0), page(40), page(80)], markdown=["", "a", "b"])
    parquet(
        base / "queries" / "test-00000.parquet",
        query_id=[0, 1, 2, 3],
        query=["angle:1", "angle:50", "angle:70", "angle:41"],
        language=["french", "english", "english", "english"],
    )
    parquet(base / "qrels" / "test-00000.parquet", query_id=[0, 1, 1, 2, 3], corpus_id=[1, 1, 2, 2, 0], score=[1, 1, 2, 2, 1])
    parquet(base / "documents_metadata" / "test-00000.parquet", file_name=["a.pdf"])


def test_vidore_v3_is_the_mean_over_languages(tmp_path):
    vidore_v3(tmp_path)
    task = known_tasks()["Vidore3HrRetrieval"]
    assert [t.name for t in find_tasks(tmp_path)] == ["Vidore3HrRetrieval"] and task.metric == "ndcg_linear@10"
    (row,) = run_tasks(AngleModel(), [task], tmp_path, tmp_path, tmp_path / "out", options=Options(progress=False))
    # french: page 0 before page 1. english: 50 finds 40 (1), 80 (2); 70 finds 80; 41 finds 40, then 80 and 0 (39 and 41 off)
    graded = (1 + 2 * SECOND) / (2 + SECOND)
    english = (graded + 1 + 1 / log2(4)) / 3
    assert row["parts"]["french"] == {"score": pytest.approx(SECOND), "queries": 1}
    assert row["parts"]["english"] == {"score": pytest.approx(english), "queries": 3}
    assert row["score"] == pytest.approx((SECOND + english) / 2)
    assert row["metrics"]["hit@1"] == pytest.approx((0 + 2 / 3) / 2)


def test_mteb_layout_is_the_same_benchmark(tmp_path):
    """A folder for each language; its judgements list the queries of all of them."""
    base = tmp_path / "Vidore3HrRetrieval"
    asked = {"english": {"id": ["e1", "e2"], "text": ["angle:50", "angle:70"]}, "french": {"id": ["f1"], "text": ["angle:1"]}}
    for language, queries in asked.items():
        parquet(base / f"{language}-queries" / "test-0.parquet", **queries)
        parquet(base / f"{language}-corpus" / "test-0.parquet", id=["p0", "p1", "p2"], image=[page(0), page(40), page(80)])
        judged = {"query-id": ["e1", "e2", "f1"], "corpus-id": ["p1", "p2", "p1"], "score": [1, 2, 1]}
        parquet(base / f"{language}-qrels" / "test-0.parquet", **judged)
    (task,) = find_tasks(tmp_path)
    (row,) = run_tasks(AngleModel(), [task], tmp_path, tmp_path, tmp_path / "out", options=Options(progress=False))
    assert row["parts"] == {"english": {"score": 1.0, "queries": 2}, "french": {"score": pytest.approx(SECOND), "queries": 1}}
    assert row["num_candidates"] == 3 and "duplicate_candidates" not in row["problems"]


def test_one_language_of_a_set(tmp_path):
    from dataclasses import replace

    vidore_v3(tmp_path, "own")
    task = replace(known_tasks()["Vidore3HrRetrieval"], name="own", hub={}, options={"language": "english"})
    assert len(load_task(task, tmp_path, tmp_path, cache=tmp_path / "cache").queries) == 3


@pytest.mark.parametrize(
    "column, values, told",
    [
        ("corpus-id", [0, None, 2], r"task ViDoRe_docvqa, corpus row 1, corpus-id: no id"),
        ("page", [0, 1, 2], r"no column 'corpus-id' \(nor corpus_id, id, _id\); it has page, image"),
    ],
)
def test_page_ids_that_are_missing(tmp_path, column, values, told):
    documents(tmp_path, "ViDoRe_docvqa")
    parquet(tmp_path / "ViDoRe_docvqa" / "corpus" / "test-00000.parquet", **{column: values, "image": [page(0)] * 3})
    with pytest.raises(ValueError, match=told):
        load_task(load_tasks()["ViDoRe_docvqa"], tmp_path, tmp_path, cache=tmp_path / "cache")


def test_integer_ids_run_through(tmp_path):
    """They ended the run with a TypeError in two of the 78 tasks."""
    documents(tmp_path, "ViDoRe_docvqa")
    (row,) = run_tasks(AngleModel(), [load_tasks()["ViDoRe_docvqa"]], tmp_path, tmp_path, tmp_path / "out", options=Options(progress=False))
    assert row["metrics"]["hit@1"] == 1.0
    first = json.loads((tmp_path / "out" / "visdoc" / "ViDoRe_docvqa_pred.jsonl").read_text().splitlines()[0])
    assert first["prediction"][0] == "0" and first["label"] == ["0"]


@pytest.mark.parametrize("protocol, folder", [("v2", "ViDoSeek-page"), ("v3", "visdoc-tasks/data/ViDoSeek-page")])
def test_labels_that_were_mended_go_first_and_the_old_ones_are_told(tmp_path, capsys, protocol, folder):
    documents(tmp_path, folder)
    task = load_tasks(protocol)["ViDoSeek-page"]
    assert [t.name for t in find_tasks(tmp_path, protocol=protocol)] == ["ViDoSeek-page"]
    load_task(task, tmp_path, tmp_path, cache=tmp_path / "cache")
    told = capsys.readouterr().err
    assert "labels that were published first, which are wrong; put VLM2Vec/ViDoSeek-page-fixed into" in told and told.count("\n") == 1
    documents(tmp_path, f"{folder}-fixed")
    parquet(tmp_path / f"{folder}-fixed" / "queries" / "test-00000.parquet", **{"query-id": [0], "query": ["angle:2"]})
    assert len(load_task(task, tmp_path, tmp_path, cache=tmp_path / "cache").queries) == 1
    assert capsys.readouterr().err == ""


def test_tables_with_tabs_know_no_quotes(tmp_path):
    """A quote is a character there, so that no line swallows the next; in a csv it is one. Cells that are missing are told by line."""
    tsv, other = tmp_path / "a.tsv", tmp_path / "b.tsv"
    tsv.write_text('query-id\tcorpus-id\tscore\nq1\t"d1\t1\nq2\td2\t1\nq3\td"3\t1\n', encoding="utf-8")
    other.write_text("query-id\tcorpus-id\tscore\nq4\t\t1\n", encoding="utf-8")
    table = read_rows([tsv, other])
    assert [row["corpus-id"] for row in table] == ['"d1', "d2", 'd"3', ""] and len(table) == 4
    assert table.where(3) == f"{other}, row 0" and table.where(2) == f"{tsv}, row 2"
    with pytest.raises(ValueError, match="b.tsv, row 0: no id"):
        read_judgements(table)
    for content, got in (("a\tb\n1\t2\n3\n", 1), ("a\tb\n1\t2\n1\t2\t3\n", 3)):
        tsv.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=f"a.tsv, line 3: expected 2 cells, as the first line has, got {got}"):
            read_rows([tsv])
    (tmp_path / "c.csv").write_text('a,b\n"1,5",2\n', encoding="utf-8")
    assert list(read_rows([tmp_path / "c.csv"])) == [{"a": "1,5", "b": "2"}]


def test_all_files_of_a_table_are_read_and_named(tmp_path):
    """Lists, lines and parquet: every file's rows, and a message names the file that a row is of."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = {"json": [], "jsonl": [], "parquet": []}
    for name in ("x", "y"):
        paths = {kind: tmp_path / f"{name}.{kind}" for kind in made}
        paths["json"].write_text(json.dumps([{"id": name}]), encoding="utf-8")
        paths["jsonl"].write_text(json.dumps({"id": name}) + "\n", encoding="utf-8")
        pq.write_table(pa.table({"id": [name]}), paths["parquet"])
        for kind, path in paths.items():
            made[kind].append(path)
    for kind, files in made.items():
        table = read_rows(files)
        assert [row["id"] for row in table] == ["x", "y"] and table[1] == {"id": "y"}, kind
        assert table.where(1) == f"{tmp_path / 'y'}.{kind}, row 0", kind
    (tmp_path / "y.json").write_text('{"id": "y"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="y.json: expected a JSON list, as .*x.json is, got lines"):
        read_rows(made["json"])
