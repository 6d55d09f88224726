"""Summaries, reports, exports and the command line around the runner."""

import json
import re
import subprocess
import sys

import pytest

from tests.helpers.evaluation_layouts import StubModel, documents, mmeb
from vlm2vec.evaluation.report.export import leaderboard, write_leaderboard
from vlm2vec.evaluation.report.html import write_report
from vlm2vec.evaluation.report.listing import list_tasks
from vlm2vec.evaluation.report.summary import markdown, terminal, write_summary
from vlm2vec.evaluation.runner import Options, run_tasks
from vlm2vec.evaluation.score.aggregate import aggregate
from vlm2vec.evaluation.tasks import find_tasks, load_tasks, published


def row(task, score):
    return {
        "task": task.name,
        "modality": task.modality,
        "group": task.group,
        "meta_task": task.meta_task,
        "split": task.split,
        "metric": task.metric,
        "score": score,
        "metrics": {task.metric: score},
        "num_queries": 10,
        "num_candidates": 5,
        "candidates_per_query": 5,
        "chance": 0.2,
        "problems": {},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    data, images = mmeb(folder, rows=12, candidates=5)
    documents(folder, pages=12, queries=6)
    rows = run_tasks(StubModel(), find_tasks(data), data, images, folder / "out", options=Options(progress=False, faiss=True))
    return folder / "out", rows


def test_means_are_the_papers():
    """Per-dataset published scores give the published means: the weighting is right."""
    rows = [row(task, published()["models"][name]["llava"] / 100) for name, task in list(load_tasks().items())[:36]]
    means = aggregate(rows)
    paper = published()["tables"]["v1"]["VLM2Vec LLaVA-1.6 LoRA high resolution (1344)"]
    ours = {n: p["score"] for n, p in {**means["meta_task"], **means["split"], "overall": means["overall"]}.items()}
    for name, value in paper.items():
        assert 100 * ours[name] == pytest.approx(value, abs=0.06), name
    assert means["complete"] == {"v1": True, "v2": False}


def test_means_of_v2_are_the_released_ones(golden):
    import yaml

    released = yaml.safe_load((golden / "facts" / "scores.yaml").read_text())["released_files"]
    for column in ("v1_2b", "v1_7b", "v2_2b"):
        rows = []
        for scores in released["per_dataset"].values():
            rows += [row(load_tasks()[name], values[column][1] / 100) for name, values in scores.items()]
        means = aggregate(rows)
        ours = {n: p["score"] for n, p in {**means["group"], **means["modality"], "all": means["overall"]}.items()}
        ours |= {f"image_{n}": p["score"] for n, p in means["split"].items()}
        for name, value in released["group_means"]["v2.0.1"][column].items():
            assert 100 * ours[name] == pytest.approx(value, abs=0.011), (column, name)
        assert means["complete"]["v2"]


def test_summary_next_to_published_rows(finished):
    out, rows = finished
    summary = write_summary(out, rows, "stub")
    assert json.loads((out / "summary.json").read_text())["means"] == summary["means"]
    text = (out / "summary.md").read_text()
    assert "| CLIP | 42.8 |" in text and "| VLM2Vec-V2 (2B) |" in text and "(ours: only the data sets above)" in text
    assert re.search(r"\| ImageNet-1K \| image_cls \| hit@1 \| \*\*\d+\.\d\*\* \| 77.5 \|", text)
    assert "mean of all" in terminal(rows, summary["means"])[-1]
    own = markdown([{**rows[0], "task": "Mine"}], aggregate(rows[:1]), "stub")
    assert not any("CLIP" in line for line in own), "tasks of one's own have no published rows"


def test_list_shows_every_task():
    text = "\n".join(list_tasks())
    for name in load_tasks():
        assert name in text
    assert re.search(r"ViDoRe_arxivqa +ndcg_linear@5 +global +500 +500 +18\.1", text)


def test_report_is_one_page_with_pictures(finished):
    out, rows = finished
    page = write_report(out, rows, "a <model>").read_text()
    assert "a &lt;model&gt;" in page and "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("<details") == 2 and page.count("data:image/jpeg;base64,") >= 8
    assert 'class="no"' in page and 'class="ok"' in page


def test_predictions_load_with_datasets(finished, tmp_path):
    from datasets import load_dataset

    out, rows = finished
    table = load_dataset("parquet", data_files=str(out / "predictions" / "*.parquet"), split="train", cache_dir=str(tmp_path))
    assert len(table) == 12 + 6
    for summary in rows:
        mine = [r for r in table if r["task"] == summary["task"]]
        assert sum(r["hit"] for r in mine) / len(mine) == pytest.approx(summary["metrics"]["hit@1"])
        for r in mine:
            assert r["rank"] is None or r["predictions"][r["rank"] - 1] in r["labels"]
            assert r["scores"] == sorted(r["scores"], reverse=True)


def test_faiss_finds_what_we_find(finished):
    faiss = pytest.importorskip("faiss")
    out, _ = finished
    index = faiss.read_index(str(out / "faiss" / "ViDoRe_arxivqa.index"))
    names = [json.loads(line) for line in (out / "faiss" / "ViDoRe_arxivqa.names.jsonl").read_text().splitlines()]
    queries = StubModel().encode([{"text": f"Find a document image that matches the given query: what about tag:{q}"} for q in range(6)])
    _, found = index.search(queries.numpy(), 3)
    predictions = [json.loads(line)["prediction"][:3] for line in (out / "visdoc" / "ViDoRe_arxivqa_pred.jsonl").read_text().splitlines()]
    assert [[names[c] for c in r] for r in found] == predictions


def test_leaderboard_file(finished):
    out, rows = finished
    board = leaderboard(rows, "org/stub", model_size="1B")
    assert board["metadata"]["model_size"] == "1B" and board["metadata"]["model_name"] == "org/stub"
    assert board["metrics"]["video"] == "DIR_N/A" and board["metrics"]["image"]["GQA"] == "FILE_N/A"
    assert board["metrics"]["image"]["ImageNet-1K"]["hit@1"] == rows[0]["score"]
    assert "ViDoSeek-page-fixed" in board["metrics"]["visdoc"] and "ViDoSeek-page" not in board["metrics"]["visdoc"]
    assert len(board["metrics"]["image"]) == 36 and len(board["metrics"]["visdoc"]) == 24
    assert write_leaderboard(out, rows, "org/stub").name == "org_stub.json"


def command(*words):
    return subprocess.run([sys.executable, "-m", "vlm2vec.cli", *map(str, words)], capture_output=True, text=True, timeout=120)


def test_command_line_says_what_is_wrong(tmp_path):
    done = command("eval", "--list")
    assert done.returncode == 0 and "MMLongBench-doc" in done.stdout
    for words, message in (
        (["eval"], "needs a MODEL"),
        (["eval", "x", "--output", tmp_path], "needs --data DIR"),
        (["eval", "x", "--output", tmp_path, "--data", tmp_path / "no"], "no data folder"),
    ):
        done = command(*words)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
