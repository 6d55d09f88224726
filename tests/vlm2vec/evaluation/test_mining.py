"""Hard negatives: filters against a plain loop, and the files in the training layout."""

import json

import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers.evaluation_layouts import StubModel, parquet, picture
from vlm2vec.data.mmeb import read_train
from vlm2vec.evaluation.mining import MineOptions, choose, exclusions, mine_dataset


@pytest.fixture
def training(tmp_path):
    """30 rows: 10 queries asked three times, 15 answers, some of them pictures."""
    for i in range(5):
        picture(tmp_path / "images" / f"{i}.png", i)
    answer = [f"answer tag:{i % 15}" for i in range(30)]
    image = [f"{i % 15}.png" if i % 15 < 5 else "" for i in range(30)]
    parquet(
        tmp_path / "train" / "Set" / "original-00000.parquet",
        qry=[f"query tag:{i % 10}" for i in range(30)],
        qry_image_path=[""] * 30,
        pos_text=answer,
        pos_image_path=image,
        family=[i % 7 for i in range(30)],
    )
    return tmp_path


def mine(folder, **options):
    facts = mine_dataset(
        StubModel(),
        folder / "train",
        "Set",
        folder / "images",
        folder / "out",
        MineOptions(**options),
        store=folder / "store",
        progress=False,
    )
    return facts, pq.read_table(folder / "out" / "Set" / "original-00000.parquet").to_pylist()


def test_negatives_are_the_highest_that_pass(training):
    model = StubModel()
    facts, rows = mine(training, negatives=3, window=(2, 9), relative=None, margin=0.05)
    table = read_train(training / "train", "Set")

    def side(text, picture):
        return {"text": text, "image": str(training / "images" / picture) if picture else None}

    pool = list(dict.fromkeys(zip(table["pos_text"], table["pos_image_path"])))
    target = model.encode([side(*p) for p in pool])
    query = model.encode([side(t, "") for t in table["qry"]])
    answers = {}
    for q, t, p in zip(table["qry"], table["pos_text"], table["pos_image_path"]):
        answers.setdefault(q, set()).add((t, p))
    for i, row in enumerate(rows):
        scores = {p: float(query[i] @ target[j]) for j, p in enumerate(pool)}
        own = scores[(row["pos_text"], row["pos_image_path"])]
        ranked = sorted((p for p in pool if p not in answers[row["qry"]]), key=lambda p: -scores[p])
        expected = [p for p in ranked[1:9] if scores[p] <= own - 0.05][:3]
        assert list(zip(row["neg_text"], row["neg_image_path"])) == expected
    assert facts["mined"] == sum(len(r["neg_text"]) for r in rows) and facts["pool"] == 15
    assert json.loads((training / "out" / "Set" / "mined.json").read_text())["rows"] == 30


def test_one_negative_is_mmebs_own_layout(training):
    facts, rows = mine(training)
    table = read_train(training / "out", "Set")
    assert facts["rows_without"] == sum(not (t or p) for t, p in zip(table["neg_text"], table["neg_image_path"]))
    assert list(table["qry"]) == [f"query tag:{i % 10}" for i in range(30)]


def test_id_column_and_unreadable_rows(training):
    (training / "images" / "3.png").unlink()
    facts, rows = mine(training, negatives=14, relative=None, id_column="family")
    assert facts["unreadable"] == 2
    answers = {}
    for i in range(30):
        answers.setdefault(i % 7, set()).add(f"answer tag:{i % 15}")
    for i, row in enumerate(rows):
        if i % 15 == 3:
            assert row["neg_text"] == []
        else:
            assert row["neg_text"] and not set(row["neg_text"]) & answers[i % 7] and "answer tag:3" not in row["neg_text"]
    with pytest.raises(ValueError, match="no column 'colour' for --id-column; it has qry"):
        mine(training, id_column="colour")


def test_margins_and_sampling():
    scores, indices = torch.tensor([[0.9, 0.8, 0.5, 0.1], [0.4, 0.3, 0.2, 0.1]]), torch.tensor([[4, 5, 6, -1], [1, 2, 3, 0]])
    own = torch.tensor([0.85, -0.1])
    picks, dropped = choose(scores, indices, own, MineOptions(negatives=2, relative=0.95))
    assert picks == [[5, 6], []] and dropped == 1 + 4, "0.8 <= 0.95 * 0.85; nothing may outrank a positive below 0"
    picks, _ = choose(scores, indices, own, MineOptions(negatives=2, relative=None, window=(2, 3)))
    assert picks == [[5, 6], [2, 3]]
    one = choose(scores, indices, own, MineOptions(relative=None, sampling="random", seed=1))[0]
    assert one == choose(scores, indices, own, MineOptions(relative=None, sampling="random", seed=1))[0]
    assert any(choose(scores, indices, own, MineOptions(relative=None, sampling="random", seed=s))[0] != one for s in range(2, 9))


def test_exclusions():
    table = exclusions([0, 0, 1], [5, 6, 6], ["a", None, "a"])
    assert [sorted(x for x in row if x >= 0) for row in table.tolist()] == [[5, 6], [5, 6], [5, 6]]
    assert table[:, 0].tolist() == [5, 6, 6]


@pytest.mark.parametrize("bad", [{"window": (0, 3)}, {"window": (4, 3)}, {"negatives": 0}, {"sampling": "best"}, {"relative": 1.5}])
def test_bad_options(bad):
    with pytest.raises(ValueError, match="--"):
        MineOptions(**bad)
