"""The runner: scores against brute force, ties, bad data, files, and the store under kills and changes."""

import json
import random

import numpy as np
import pytest
import torch

from tests.helpers.evaluation_layouts import StubModel, documents, files, mmeb, parquet, picture
from vlm2vec.evaluation.encode.store import EmbeddingStore
from vlm2vec.evaluation.report.summary import write_summary
from vlm2vec.evaluation.runner import Options, run_tasks
from vlm2vec.evaluation.score.metrics import ranking_metrics
from vlm2vec.evaluation.score.ranking import rank
from vlm2vec.evaluation.tasks import find_tasks, load_tasks, make_task

QUIET = {"progress": False}


def run(model, data, images, output, names=None, **options):
    tasks = find_tasks(data, names)
    return run_tasks(model, tasks, data, images, output, options=Options(**QUIET, **options))


@pytest.fixture
def mixed(tmp_path):
    """Two image tasks that share candidates, and a document task."""
    mmeb(tmp_path, "ImageNet-1K", rows=20, candidates=12)
    mmeb(tmp_path, "OK-VQA", rows=15, candidates=12, pictures=False)
    documents(tmp_path)
    return tmp_path / "eval", tmp_path / "images"


def test_scores_equal_brute_force(mixed, tmp_path):
    """Every metric of both layouts, against a full matrix, argsort and the metric functions on names."""
    data, images = mixed
    model = StubModel()
    rows = {r["task"]: r for r in run(model, data, images, tmp_path / "out")}
    from vlm2vec.evaluation.loaders import load_task

    for name in rows:
        loaded = load_task(load_tasks()[name], data, images, cache=tmp_path / "out" / "media")
        q, c = model.encode(loaded.queries), model.encode(loaded.candidates)
        scores = (q.double() @ c.double().T).numpy()
        ranked = []
        for i in range(len(q)):
            mine = np.array(loaded.local[i] if loaded.local is not None else range(len(c)))
            ranked.append([loaded.names[j] for j in mine[np.argsort(-scores[i][mine], kind="stable")]])
        expected = ranking_metrics(ranked, loaded.label_names, loaded.grades)
        assert rows[name]["metrics"] == pytest.approx(expected, abs=1e-9)
        assert 0 < rows[name]["score"] < 1, "a score at the end of its range tests little"


def test_files_as_the_reference_writes_them(mixed, tmp_path):
    data, images = mixed
    out = tmp_path / "out"
    rows = {r["task"]: r for r in run(StubModel(), data, images, out)}
    v1 = json.loads((out / "ImageNet-1K_score.json").read_text())
    assert v1.pop("run") == rows["ImageNet-1K"]["run"]
    assert v1 == {"acc": rows["ImageNet-1K"]["score"], "num_correct": round(20 * v1["acc"]), "num_pred": 20}
    lines = (out / "ImageNet-1K_pred.txt").read_text().splitlines()
    assert len(lines) == 20 and all(line.startswith("('label tag:") and line.endswith(", '')") for line in lines)
    score = json.loads((out / "image" / "ImageNet-1K_score.json").read_text())
    assert list(score)[:4] == ["hit@1", "hit@5", "hit@10", "ndcg_linear@1"] and (score["num_pred"], score["num_data"]) == (20, 20)
    first = json.loads((out / "visdoc" / "ViDoRe_arxivqa_pred.jsonl").read_text().splitlines()[0])
    info = json.loads((out / "visdoc" / "ViDoRe_arxivqa_info.jsonl").read_text().splitlines()[0])
    assert len(first["prediction"]) == 30 and len(first["rel_scores"]) == len(first["label"]) == len(info["rel_scores"])
    top = json.loads((out / "ImageNet-1K_top.jsonl").read_text().splitlines()[0])
    assert top["top"][top["rank"] - 1]["correct"] if top["rank"] and top["rank"] <= 5 else True
    assert not list(out.rglob("*.pkl")) and not list(out.rglob("*_qry")), "nothing is pickled"
    # the scores can be made again from the prediction files alone
    for name in ("ImageNet-1K", "OK-VQA"):
        again = [json.loads(line) for line in (out / "image" / f"{name}_pred.jsonl").read_text().splitlines()]
        assert ranking_metrics([r["prediction"] for r in again], [r["label"] for r in again]) == pytest.approx(
            rows[name]["metrics"], abs=1e-12
        )


def test_ties_favour_the_positive(tmp_path):
    """Equal content under two names: the first of the list wins, which is the positive."""
    picture(tmp_path / "a.png", 1)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    for name, paths in (("NIGHTS", ["a.png", "b.png"]), ("CIRR", ["b.png", "a.png"])):
        parquet(tmp_path / name / "test-0.parquet", qry_text=["q"], qry_img_path=[""], tgt_text=[["same", "same"]], tgt_img_path=[paths])
    rows = run(StubModel(), tmp_path, tmp_path, tmp_path / "out")
    assert [r["score"] for r in rows] == [1.0, 1.0]


@pytest.mark.parametrize("local", [True, False])
def test_rank_against_argsort(local):
    """Ties by order, blocked candidates, short lists, shared vectors; 37 x 90, wider than one list of 64."""
    g = torch.Generator().manual_seed(1)
    query = torch.randint(-2, 3, (37, 6), generator=g).float()
    target = torch.randint(-2, 3, (70, 6), generator=g).float()
    row = torch.randint(0, 70, (90,), generator=g)
    blocked = torch.rand(90, generator=g) < 0.1
    lists = [random.Random(i).sample(range(90), [0, 1, 5, 64][i % 4]) for i in range(37)]
    scores, indices = rank(query, target, 7, local=lists if local else None, target_row=row, blocked=blocked)
    full = (query @ target.T)[:, row].numpy()
    for i in range(37):
        mine = [c for c in (lists[i] if local else range(90)) if not blocked[c]]
        expected = sorted(mine, key=lambda c: -full[i, c])[:7] if local else None
        got = [c for c in indices[i].tolist() if c >= 0]
        if local:
            assert got == expected
        else:
            assert [full[i, c] for c in got] == sorted((full[i, c] for c in mine), reverse=True)[:7]
            for a, b in zip(got, got[1:]):
                assert full[i, a] > full[i, b] or row[a] != row[b] or a < b
        assert scores[i, : len(got)].tolist() == [full[i, c] for c in got]
        assert torch.isneginf(scores[i, len(got) :]).all()


def test_global_ties_take_the_first_candidate():
    query, target = torch.ones(1, 2), torch.ones(4, 2)
    assert rank(query, target, 3)[1].tolist() == [[0, 1, 2]]
    assert rank(query, target, 3, target_row=torch.tensor([3, 1, 3, 0, 2]))[1].tolist() == [[0, 2, 1]]
    assert rank(query, target, 3, blocked=torch.tensor([True, False, True, True]))[1].tolist() == [[1, -1, -1]]


def test_bad_data_is_counted_and_scored_by_rule(tmp_path):
    data, images = mmeb(tmp_path, "ImageNet-1K", rows=10, candidates=4)
    (images / "ImageNet-1K" / "3.png").unlink()
    broken = images / "ImageNet-1K" / "4.png"
    broken.write_bytes(broken.read_bytes()[:200])
    for i in range(4):
        picture(images / f"t{i}.png", 90 + i)
    (images / "t2.png").write_bytes(b"")
    empty = {"qry_img_path": [""] * 5, "qry_text": [f"tag:{i}" for i in range(5)]}
    parquet(
        data / "NIGHTS" / "test-0.parquet",
        **empty,
        tgt_text=[["tag:0", "x"], [], ["", "x"], ["tag:3", "tag:3"], ["tag:4", "y"]],
        tgt_img_path=[["t0.png", "t1.png"], [], ["", "t0.png"], ["t3.png", "t3.png"], ["t2.png", "t0.png"]],
    )
    rows = {r["task"]: r for r in run(StubModel(noise=0.1), data, images, tmp_path / "out")}
    bad = rows["ImageNet-1K"]["problems"]
    assert bad["affected_rows"] == 2 and "3.png" in bad["unreadable_query"]["examples"][0] + bad["unreadable_query"]["examples"][1]
    assert any("4.png" in e for e in bad["unreadable_query"]["examples"])
    assert rows["ImageNet-1K"]["score"] == pytest.approx(0.8), "the two rows count as wrong"
    bad = rows["NIGHTS"]["problems"]
    kinds = {k: v["rows"] for k, v in bad.items() if isinstance(v, dict)}
    assert kinds == {
        "empty_candidates": 1,
        "absent_positive": 2,
        "duplicate_candidates": 1,
        "unreadable_candidate": 1,
        "unreadable_positive": 1,
    }
    assert bad["affected_rows"] == 3 and rows["NIGHTS"]["score"] == pytest.approx(2 / 5)
    summary = write_summary(tmp_path / "out", list(rows.values()), "stub")
    assert summary["affected_rows"] == 5
    assert "2 of 10 rows affected" in (tmp_path / "out" / "summary.md").read_text()
    with pytest.raises(ValueError, match="task ImageNet-1K: unreadable query: 2 rows .*refused because of --strict"):
        run(StubModel(), data, images, tmp_path / "out2", strict=True)


def test_wrong_image_folder_is_refused_before_encoding(tmp_path):
    data, images = mmeb(tmp_path, rows=6)
    model = StubModel()
    with pytest.raises(ValueError, match=r"6 of 6 images or videos cannot be read.*is the image folder"):
        run(model, data, tmp_path / "elsewhere", tmp_path / "out")
    assert not model.encoded


def test_vectors_that_are_not_finite_are_refused(tmp_path):
    data, images = mmeb(tmp_path, rows=3)
    model = StubModel()
    encode = model.encode
    model.encode = lambda inputs, **o: encode(inputs, **o) * torch.tensor(float("nan"))
    with pytest.raises(ValueError, match="label tag.*: the model.s vector for it is not finite"):
        run(model, data, images, tmp_path / "out")


def test_each_distinct_input_once_and_any_order(mixed, tmp_path):
    data, images = mixed
    names = ["ImageNet-1K", "OK-VQA", "ViDoRe_arxivqa"]
    model = StubModel()
    run(model, data, images, tmp_path / "one")
    assert len(model.encoded) == len(set(model.encoded))
    shared = 12  # the labels of the two image tasks
    assert len(model.encoded) == 20 + 12 + shared + 12 + 30, "three of the 15 text queries repeat"
    for order in (names[::-1], [names[1], names[2], names[0]]):
        folder = tmp_path / "-".join(order)
        for name in order:
            run(StubModel(), data, images, folder, [name])
        assert {k: v for k, v in files(folder).items()} == files(tmp_path / "one")


def test_killed_at_ten_moments_encodes_nothing_twice_but_the_shard_in_flight(mixed, tmp_path):
    data, images = mixed
    run(StubModel(), data, images, tmp_path / "whole")
    total, cost = 86, 200
    for moment in random.Random(5).sample(range(total), 10):
        out, seen = tmp_path / f"killed-{moment}", []
        model = StubModel(fail_after=moment)
        with pytest.raises(KeyboardInterrupt):
            run(model, data, images, out, shard_cost=cost)
        seen += model.encoded
        again = StubModel()
        run(again, data, images, out, shard_cost=cost)
        twice = len(seen) + len(again.encoded) - total
        assert 0 <= twice <= cost // 4 and set(map(tuple, again.encoded)) | set(map(tuple, seen))
        store = [p for p in (out / "embeddings").rglob("*") if p.suffix == ".part"]
        assert not store, "no half-written shard stays"
        assert files(out) == files(tmp_path / "whole")


def test_two_processes_deal_shards(mixed, tmp_path):
    """Rank 0 and rank 1 of 2, one after the other in one process: disjoint work, the files of one process."""
    data, images = mixed
    run(StubModel(), data, images, tmp_path / "one", shard_cost=200)
    models = [StubModel(), StubModel()]

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    for r in (0, 1):
        with pytest.raises(Stop):
            run(models[r], data, images, tmp_path / "two", rank=r, world=2, barrier=stop, shard_cost=200)
    assert not set(models[0].encoded) & set(models[1].encoded) and models[0].encoded and models[1].encoded
    idle = [StubModel(), StubModel()]
    for r in (1, 0):
        try:
            run(idle[r], data, images, tmp_path / "two", rank=r, world=2, barrier=lambda: None, shard_cost=200)
        except FileNotFoundError:
            assert r == 1, "the first to come here waits for the other's files in real life"
    assert not idle[0].encoded + idle[1].encoded
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_store_never_serves_stale_vectors(tmp_path):
    data, images = mmeb(tmp_path, rows=6, candidates=4)
    store = tmp_path / "store"

    def count(model, **options):
        run_tasks(model, find_tasks(data), data, images, tmp_path / "out", store=store, options=Options(**QUIET, **options))
        return len(model.encoded)

    assert count(StubModel()) == 10
    assert count(StubModel()) == 0
    assert count(StubModel(seed=1)) == 10, "another model"
    assert count(StubModel(), prompt="Say: ") == 10, "another prompt"
    picture(images / "ImageNet-1K" / "2.png", 777)
    assert count(StubModel()) == 1, "one changed picture"
    (images / "ImageNet-1K" / "5.png").rename(images / "ImageNet-1K" / "moved.png")
    picture(images / "ImageNet-1K" / "5.png", 5)
    assert count(StubModel()) == 0, "the same bytes written again"


def test_truncated_shard_is_set_aside_and_made_again(tmp_path):
    data, images = mmeb(tmp_path, rows=6, candidates=4)
    run(StubModel(), data, images, tmp_path / "out")
    before = files(tmp_path / "out")
    shards = sorted((tmp_path / "out" / "embeddings").rglob("shard-*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-40])
    model, options = StubModel(), Options(**QUIET)
    rows = run_tasks(model, find_tasks(data), data, images, tmp_path / "out", options=options)
    assert model.encoded and files(tmp_path / "out") == before
    assert list((tmp_path / "out" / "embeddings").rglob("*.broken"))
    summary = write_summary(tmp_path / "out", rows, "stub", broken_shards=options.broken_shards)
    assert len(summary["broken_shards"]) == 1 and shards[0].name in summary["broken_shards"][0]
    assert shards[0].name in (tmp_path / "out" / "summary.md").read_text()


def test_store_round_trip(tmp_path):
    store = EmbeddingStore(tmp_path, {"model": "x"})
    keys = [bytes([i]) * 16 for i in range(5)]
    vectors = torch.randn(5, 3)
    store.add(keys[:2], vectors[:2])
    store.add(keys[2:], vectors[2:].bfloat16().float())
    again = EmbeddingStore(tmp_path, {"model": "x"})
    assert torch.equal(again.get(keys[:2][::-1]), vectors[:2].flip(0)) and len(again) == 5
    with pytest.raises(ValueError, match="width 3, got 4"):
        again.add([b"z" * 16], torch.randn(1, 4))
    with pytest.raises(ValueError, match="one embedding per input, got 2 for 1"):
        again.add([b"z" * 16], torch.randn(2, 3))


def test_own_metric_and_global_candidates(tmp_path):
    data, images = mmeb(tmp_path, "Mine", rows=8, candidates=4)
    task = make_task({"name": "Mine", "metric": "mrr@3", "candidates": "global"}, "here")
    row = run_tasks(StubModel(), [task], data, images, tmp_path / "out", options=Options(**QUIET))[0]
    assert row["metric"] == "mrr@3" and 0 < row["score"] <= 1 and row["metrics"]["mrr@1"] <= row["score"] <= row["metrics"]["mrr@5"]
