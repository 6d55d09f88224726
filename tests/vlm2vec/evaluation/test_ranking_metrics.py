"""Metrics against the reference's own values and, where conventions agree, against pytrec_eval."""

import json

import numpy as np
import pytest

from vlm2vec.evaluation.score.metrics import per_query_metrics, ranking_metrics

KS = (1, 5, 10)


def test_golden_cases_to_the_last_digits(golden):
    cases = json.loads((golden / "metrics_v2" / "cases.json").read_text())["cases"]
    graded = 0
    for case in cases:
        plain = ranking_metrics([case["prediction"]], [case["label"]])
        with_grades = ranking_metrics([case["prediction"]], [case["label"]], [case["rel_scores"]])
        for key, value in case["values"].items():
            ours = with_grades[key.removeprefix("graded_")] if key.startswith("graded_") else plain[key]
            graded += key.startswith("graded_")
            assert ours == pytest.approx(value, abs=1e-12), (case["id"], key)
        for key in plain:
            if not key.startswith("ndcg"):
                assert with_grades[key] == plain[key], "grades touch nDCG alone"
    assert graded


def test_golden_aggregates(golden):
    content = json.loads((golden / "metrics_v2" / "cases.json").read_text())
    cases = content["cases"]
    ours = ranking_metrics([c["prediction"] for c in cases], [c["label"] for c in cases])
    for key, value in content["aggregate_binary_relevance"].items():
        assert ours[key] == pytest.approx(value, abs=1e-12), key
    assert set(ours) == set(content["aggregate_binary_relevance"])
    graded = [c for c in cases if c["rel_scores"] is not None]
    ours = ranking_metrics([c["prediction"] for c in graded], [c["label"] for c in graded], [c["rel_scores"] for c in graded])
    for key, value in content["graded_note"]["mean_of_per_case"].items():
        assert ours[key] == pytest.approx(value, abs=1e-12), key
    for extra in content["evaluate_extra"]:
        label = extra["label"] if isinstance(extra["label"], list) else [extra["label"]]
        ours = ranking_metrics([extra["prediction"]], [label])
        for key, value in extra["evaluate"].items():
            assert ours[key] == pytest.approx(value, abs=1e-12), key


@pytest.fixture(scope="module")
def random_rankings():
    """400 rankings of 60 documents, 1-12 graded labels, some of them not ranked."""
    rng = np.random.default_rng(7)
    ranked, labels, grades = [], [], []
    for _ in range(400):
        names = [f"d{i}" for i in rng.permutation(60)]
        count = int(rng.integers(1, 13))
        ranked.append(names[: int(rng.integers(11, 50))])
        labels.append([f"d{i}" for i in rng.choice(60, count, replace=False)])
        grades.append([int(g) for g in rng.integers(1, 4, count)])
    return ranked, labels, grades


def test_equal_to_pytrec_eval(random_rankings):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    ranked, labels, grades = random_rankings
    qrel = {str(i): dict(zip(label, grade)) for i, (label, grade) in enumerate(zip(labels, grades))}
    run = {str(i): {name: float(-j) for j, name in enumerate(row)} for i, row in enumerate(ranked)}
    names = {"P.1,5,10", "recall.1,5,10", "ndcg_cut.1,5,10", "success.1,5,10", "map_cut.1,5,10"}
    theirs = pytrec_eval.RelevanceEvaluator(qrel, names).evaluate(run)
    ours = per_query_metrics(ranked, labels, grades)
    exponential = pytrec_eval.RelevanceEvaluator(
        {q: {d: 2**g - 1 for d, g in row.items()} for q, row in qrel.items()}, {"ndcg_cut.1,5,10"}
    ).evaluate(run)
    reciprocal = pytrec_eval.RelevanceEvaluator(qrel, {"recip_rank"})
    for k in KS:
        cut = reciprocal.evaluate({q: dict(list(row.items())[:k]) for q, row in run.items()})
        for i in range(len(ranked)):
            row = theirs[str(i)]
            assert ours[f"precision@{k}"][i] == pytest.approx(row[f"P_{k}"], abs=1e-9)
            assert ours[f"recall@{k}"][i] == pytest.approx(row[f"recall_{k}"], abs=1e-9)
            assert ours[f"hit@{k}"][i] == pytest.approx(row[f"success_{k}"], abs=1e-9)
            assert ours[f"ndcg_linear@{k}"][i] == pytest.approx(row[f"ndcg_cut_{k}"], abs=1e-9)
            assert ours[f"ndcg_exponential@{k}"][i] == pytest.approx(exponential[str(i)][f"ndcg_cut_{k}"], abs=1e-9)
            assert ours[f"mrr@{k}"][i] == pytest.approx(cut[str(i)]["recip_rank"], abs=1e-9)
            # MAP: the reference divides by min(labels, k), trec by the number of labels
            n = len(labels[i])
            assert ours[f"map@{k}"][i] * min(n, k) == pytest.approx(row[f"map_cut_{k}"] * n, abs=1e-9)


def test_conventions_where_libraries_differ():
    ours = ranking_metrics([["a", "b"]], [["a", "x", "y"]])
    assert ours["map@1"] == 1.0, "divided by min(labels, k); ranx and trec give 1/3"
    assert ours["precision@5"] == 0.2, "divided by k although two were ranked"
    empty = ranking_metrics([["a", "b"]], [[]])
    assert {k for k, v in empty.items() if v} == {"recall@1", "recall@5", "recall@10"}
    twice = ranking_metrics([["a", "b", "c"]], [["b", "b", "c"]], [[1, 3, 2]])
    best = (3 / np.log2(2) + 2 / np.log2(3)) ** -1
    assert twice["ndcg_linear@5"] == pytest.approx((3 / np.log2(3) + 2 / np.log2(4)) * best, abs=1e-12)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="query 0: 2 labels but 1 relevance"):
        ranking_metrics([["a"]], [["a", "b"]], [[1]])
    with pytest.raises(ValueError, match="one ranking, label list"):
        ranking_metrics([["a"]], [])
    with pytest.raises(ValueError, match="at least 1"):
        ranking_metrics([["a"]], [["a"]], ks=(0,))
