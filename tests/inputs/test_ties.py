"""Ties: what a collapsed model scores, by MMEB's order and with ties lost; in evaluation and on held-out rows."""

import json

import pytest
import torch

from vlm2vec.data.mmeb import write_eval
from vlm2vec.evaluation.report.summary import terminal, write_summary
from vlm2vec.evaluation.runner import Options, run_tasks
from vlm2vec.evaluation.score.aggregate import aggregate
from vlm2vec.evaluation.score.ties import TIE, held_out_ties, ties
from vlm2vec.evaluation.tasks import find_tasks


@pytest.mark.parametrize(
    ("scores", "labels", "tied", "lost"),
    [
        ([0.9, 0.5, 0.1], [0], False, [0, 1, 2]),
        ([0.9, 0.9, 0.1], [0], True, [1, 0, 2]),
        ([0.9, 0.9 - TIE / 4, 0.1], [0], True, [1, 0, 2]),  # apart by a rounding
        ([0.9, 0.9 - 4 * TIE, 0.1], [0], False, [0, 1, 2]),
        ([0.5, 0.5, 0.5], [0], True, [1, 2, 0]),
        ([0.5, 0.5, 0.5], [2], True, [0, 1, 2]),
        ([0.9, 0.5, 0.5], [1], True, [0, 2, 1]),
        ([0.9, 0.9, 0.1], [0, 1], False, [0, 1, 2]),  # two right ones may tie
        ([0.9, 0.5, 0.5], [0], False, [0, 1, 2]),  # two wrong ones too, below the right one
        ([0.9, 0.9, 0.1], [-2], True, [0, 1, 2]),  # the order decides what comes first
        ([0.9, 0.9, 0.1], [1], True, [0, 1, 2]),
        ([0.9], [0], False, [0]),
    ],
)
def test_ties_are_found_and_lost(scores, labels, tied, lost):
    assert ties(torch.tensor([scores]), [list(range(len(scores)))], [labels]) == ([tied], [lost])


def test_places_without_a_candidate_stay_behind():
    scores = torch.tensor([[0.5, 0.5, float("-inf")]])
    assert ties(scores, [[4, 7, None]], [[4]]) == ([True], [[7, 4, None]])


class Model:
    """Gives the vectors of a table; the same one for what is not in it."""

    embedding_dim = 8

    def __init__(self, vectors=()):
        self.vectors = dict(vectors)

    def identity(self):
        return {"vectors": sorted(self.vectors)}

    def preprocess(self, inputs):
        return inputs

    def encode(self, inputs, **_):
        rows = [self.vectors.get(item["text"], [1.0] + [0.0] * 7) for item in inputs]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


def scored(tmp_path, model, capsys):
    rows = [
        {"qry_text": f"query {i}", "qry_img_path": "", "tgt_text": [f"right {i}", *(f"wrong {i} {j}" for j in range(11))]}
        for i in range(20)
    ]
    write_eval(tmp_path / "data", "Own", [{**row, "tgt_img_path": [""] * 12} for row in rows])
    tasks = find_tasks(tmp_path / "data", None, {})
    summaries = run_tasks(model, tasks, tmp_path / "data", tmp_path, tmp_path / "scores", options=Options(progress=False))
    return summaries, capsys.readouterr().err


def test_a_collapsed_model_scores_all_by_order_and_nothing_with_ties_lost(tmp_path, capsys):
    summaries, err = scored(tmp_path, Model(), capsys)
    (row,) = summaries
    assert row["score"] == 1.0, "MMEB's number stays"
    assert row["ties"] == {"queries": 20, "share": 1.0, "score_ties_lost": 0.0}
    assert "Own: 100.0% of the queries are tied" in err and "with ties lost hit@1 is 0.0 %, not 100.0 %" in err
    assert json.loads((tmp_path / "scores" / "tasks" / "Own.json").read_text())["ties"] == row["ties"]
    assert "100.0% tied, 0.0 with ties lost" in "\n".join(terminal(summaries, aggregate(summaries)))
    write_summary(tmp_path / "scores", summaries, "model")
    assert "| Own | 100.0% | 100.0 | 0.0 |" in (tmp_path / "scores" / "summary.md").read_text()


def test_a_model_without_ties_is_told_nothing(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    vectors = {}
    for i in range(20):
        vectors[f"query {i}"] = vectors[f"right {i}"] = torch.randn(8, generator=generator).tolist()
        vectors |= {f"wrong {i} {j}": torch.randn(8, generator=generator).tolist() for j in range(11)}
    (row,), err = scored(tmp_path, Model(vectors), capsys)
    assert row["score"] == row["ties"]["score_ties_lost"] == 1.0 and row["ties"]["share"] == 0.0 and "tied" not in err


def test_held_out_rows_by_the_same_rule():
    query = torch.eye(4)
    target = torch.eye(4)
    everyone = torch.ones(4, dtype=torch.bool)
    ids = torch.arange(4)
    assert held_out_ties(query, target, ids, everyone).tolist() == [False] * 4
    target[1] = target[0]
    query[1] = query[0]
    assert held_out_ties(query, target, ids, everyone).tolist() == [True, True, False, False]
    assert held_out_ties(query, target, torch.tensor([0, 0, 2, 3]), everyone).tolist() == [False] * 4, "equal targets are one answer"
    readable = torch.tensor([True, False, True, True])
    assert held_out_ties(query, target, ids, readable).tolist() == [False] * 4
    assert held_out_ties(torch.ones(4, 2), torch.ones(4, 2), ids, everyone).all(), "a collapsed model"
