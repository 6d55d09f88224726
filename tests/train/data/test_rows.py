"""From a row to a sample: whatever is wrong with it costs that row alone; contents have ids; hard negatives reach the loss."""

import logging
import struct
import zlib
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_recipe import first_batch, gradients, write_recipe
from train.build import build_model
from train.data.rows import PairDataset, collate, content_id, longest_sample, to_features
from train.data.sources import open_source
from train.data.unreadable_rows import UnreadableRows
from train.recipe.schema import Data, Source, load_recipe
from train.run import run
from train.step import ContrastiveStep
from vlm2vec.data.mmeb import write_train


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def processing(root):
    return build_model(load_recipe(write_recipe(root))).processing


# Rows that cannot be read


class Fails:
    """A processing that raises for the texts that say "bad"."""

    def __init__(self, processing, error):
        self.processing, self.error, self.options = processing, error, processing.options

    def __call__(self, x):
        return self.processing(x)

    def measure(self, x):
        if "bad" in x["text"]:
            raise self.error
        return self.processing.measure(x)


ERRORS = [
    struct.error("unpack requires a buffer of 4 bytes"),
    zlib.error("Error -3 while decompressing"),
    EOFError("no more"),
    KeyError("ImageWidth"),
    IndexError("list index out of range"),
    TypeError("'NoneType' object is not iterable"),
    OSError("broken data stream"),
    ZeroDivisionError("division by zero"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_costs_its_row_and_is_named(tmp_path, processing, error):
    rows = [{"qry": "good", "qry_image_path": "", "pos_text": "yes", "pos_image_path": ""}] * 2
    write_train(tmp_path, "Mixed", [rows[0], rows[0] | {"qry": "bad"}])
    data = Data(root=str(tmp_path), images="", sources=[Source("Mixed")])
    dataset = PairDataset(data, Fails(processing, error))
    good, bad = dataset[0, 0], dataset[0, 1]
    assert good["error"] is None
    assert bad["error"] == f"Mixed, row 1: {type(error).__name__}: {error}"
    batch = collate([good, bad])
    assert batch["kept"].tolist() == [True, False] and batch["errors"] == [bad["error"]]
    data.strict = True
    with pytest.raises(ValueError, match="Mixed, row 1: .*data.strict"):
        dataset[0, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_malformed_row_is_left_out_of_a_run_and_stops_a_strict_one(root, tmp_path, caplog, workers):
    import datasets

    said = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "A fox runs."}]
    rows = [{"video": "film", "conversations": said} for _ in range(12)]
    rows[7]["conversations"] = None
    datasets.Dataset.from_list(rows).to_json(tmp_path / "clips.jsonl")
    (tmp_path / "film").mkdir()
    (tmp_path / "film" / "1.jpg").write_bytes((root / "images" / "1.jpg").read_bytes())
    source = {"name": "Films", "format": "video_question", "file": "clips.jsonl"}
    data = {"root": str(tmp_path), "images": str(tmp_path), "sources": [source]}
    changes = {"data": data, "steps": 3, "global_batch": 4, "workers": workers}
    with caplog.at_level(logging.WARNING, logger="train.trainer"):
        assert run([str(write_recipe(root, output=str(tmp_path / "output"), **changes))]) == 0
    left = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(left) == 1 and "Films, row 7: TypeError" in left[0], "once in the epoch"
    with pytest.raises(ValueError) as stopped:
        run([str(write_recipe(root, output=str(tmp_path / "strict"), **changes)), "--data.strict"])
    assert str(stopped.value).startswith("Films, row 7: TypeError") and "\n" not in str(stopped.value)


def test_a_workers_error_arrives_without_its_traceback(root, tmp_path, monkeypatch):
    monkeypatch.setattr("train.preflight.check_rows", lambda recipe, processing: None)
    path = root / "images" / "4.jpg"
    whole = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(ValueError) as stopped:
            run([str(write_recipe(root, output=str(tmp_path / "output"), workers=1, steps=12)), "--data.strict"])
    finally:
        path.write_bytes(whole)
    assert str(stopped.value).startswith("Pictures, row 4: image") and "\n" not in str(stopped.value)


# How many may be lost


def lose(*steps, last=None):
    """Counts of steps of four rows, so many of them bad."""
    unreadable = UnreadableRows()
    for step, count in enumerate(steps):
        unreadable.add(["x"] * count, 4, device=torch.device("cpu"), is_last=step == last)
    return unreadable


def test_a_few_bad_rows_never_stop_a_run_and_most_do():
    lose(4, 4, 0, 0, 0)  # a bad start
    lose(*[4] * 15)  # sixty rows say nothing yet
    with pytest.raises(ValueError, match=r"64 of the first 64 rows cannot be read.*: x; look at data\.root and data\.images"):
        lose(*[4] * 16)
    lose(*[2] * 100)  # half of them
    with pytest.raises(ValueError, match="33 of the first 64 rows"):
        lose(*[2] * 15, 3)
    with pytest.raises(ValueError, match="8 of the first 8 rows"):
        lose(4, 4, last=1)  # nothing comes after these


def test_bad_images_in_the_first_batch_cost_their_rows(root, tmp_path, caplog):
    """Batches of two, both of them bad: all that the run has seen, and yet no reason to stop."""
    names = [f"{row}.jpg" for row in range(24)]
    held = {name: (root / "images" / name).read_bytes() for name in names}
    changes = {"global_batch": 2, "interleave_batch_size": 2, "output": str(tmp_path / "output"), "seed": 3}
    recipe = load_recipe(write_recipe(root, **changes))
    pictures = [row for source, row in first_batch(recipe, build_model(recipe))["rows"] if source == 0]
    assert len(pictures) == 2, "the first block is of pictures"
    for row in pictures:
        (root / "images" / names[row]).unlink()
    try:
        with caplog.at_level(logging.WARNING, logger="train.trainer"):
            assert run([str(write_recipe(root, **changes))]) == 0
    finally:
        for row in pictures:
            (root / "images" / names[row]).write_bytes(held[names[row]])
    assert sum("left out of step 1" in record.getMessage() for record in caplog.records) == 2


# Ids of contents


def test_ids_tell_contents_apart_and_are_the_same_everywhere():
    fox = {"text": "a fox", "image": None}
    assert content_id(fox) == content_id({"text": "a fox"}) == content_id({"text": "a fox", "image": ""})
    # Of the text's bytes alone, so that it is the same in every process and every release.
    assert content_id(fox) == 8796041989648054532
    items = [
        fox,
        {"text": "a Fox"},
        {"text": "a fox", "image": "1.jpg"},
        {"text": "a fox", "image": "2.jpg"},
        {"text": "a fox", "image": b"1.jpg\0"},
        {"text": "a fox", "video": ["1.jpg", "2.jpg"]},
        {"text": "a fox", "video": ["2.jpg", "1.jpg"]},
        {"text": "a fox1.jpg"},
    ]
    ids = [content_id(item) for item in items]
    assert len(set(ids)) == len(ids) and all(0 <= i < 2**63 for i in ids)
    assert content_id({"text": "x", "image": "a/b.jpg"}) == content_id({"text": "x", "image": Path("a", "b.jpg")})


# Hard negatives and duplicates in the loss


def write_pairs(folder):
    """Eight rows: the positives of 0 and 1 are the same; row 2's negative is its own positive; row 3's is row 0's positive;
    rows 4 to 7 have other negatives, or none."""
    rows = [
        {"qry": f"find number {i} " + "please " * i, "qry_image_path": "", "pos_text": f"thing {max(i, 1)}", "pos_image_path": ""}
        for i in range(8)
    ]
    negatives = ["near one", "near two", "thing 2", "thing 1", "a b c", "", "d", "e f"]
    write_train(folder, "Pairs", [row | {"neg_text": text} for row, text in zip(rows, negatives, strict=True)])
    return {"root": str(folder), "images": "", "sources": [{"name": "Pairs"}]}


def test_negatives_of_a_row_are_samples_with_offsets_and_ids(tmp_path, processing):
    data = Data(**write_pairs(tmp_path) | {"sources": [Source("Pairs")]})
    rows = [(0, i) for i in (4, 5, 7)]
    without = collate([PairDataset(data, processing)[row] for row in rows])
    assert without["negatives"] == [] and without["hard_offsets"].tolist() == [0, 0, 0, 0]
    data.hard_negatives = True
    batch = collate([PairDataset(data, processing)[row] for row in rows])
    assert batch["hard_offsets"].tolist() == [0, 1, 1, 2], "row 5 has none"
    expected = [processing({"text": text}).input_ids for text in ("a b c", "e f")]
    assert all(torch.equal(to_features(got).input_ids, want) for got, want in zip(batch["negatives"], expected, strict=True))
    assert batch["hard_ids"].tolist() == [content_id({"text": text}) for text in ("a b c", "e f")]
    assert batch["target_ids"].tolist() == [content_id({"text": f"thing {i}"}) for i in (4, 5, 7)]


def test_several_negatives_of_a_row(tmp_path):
    import datasets

    row = {"qry": "q", "qry_image_path": "", "pos_text": "p", "pos_image_path": ""}
    rows = [row | {"neg_text": ["a", "b", ""], "neg_image_path": ["", "n.jpg", ""]}, row | {"neg_text": [], "neg_image_path": []}]
    (tmp_path / "Many").mkdir()
    datasets.Dataset.from_list(rows).to_json(tmp_path / "many.jsonl")
    data = Data(root=str(tmp_path), images="pictures", sources=[Source("Many", file="many.jsonl")])
    table = open_source(data, data.sources[0])
    negatives = table.row(0, 8)[2]
    assert negatives == [{"text": "a", "image": None}, {"text": "b", "image": "pictures/n.jpg"}]
    assert table.row(1, 8)[2] == []


def test_the_longest_sample_of_a_batch_is_named_by_its_row(tmp_path, processing):
    data = Data(**write_pairs(tmp_path) | {"sources": [Source("Pairs")]}, hard_negatives=True)
    dataset = PairDataset(data, processing)
    batch = collate([dataset[0, i] for i in (0, 5, 2)])
    assert longest_sample(batch) == ((0, 5), len(batch["query"][1]["input_ids"]))
    batch["negatives"][1] = dict(batch["negatives"][1], input_ids=batch["query"][1]["input_ids"].repeat(3))
    assert longest_sample(batch) == ((0, 2), 3 * len(batch["query"][1]["input_ids"])), "a negative belongs to its row; row 5 has none"


@pytest.mark.parametrize("mask_duplicates", [True, False])
@pytest.mark.parametrize("hard", [True, False], ids=["hard negatives", "in-batch alone"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_step_is_the_loss_written_out(root, tmp_path, mask_duplicates, hard, symmetric):
    data = write_pairs(tmp_path / "data") | {"hard_negatives": hard}
    loss = {"mask_duplicates": mask_duplicates, "temperature": 0.2, "symmetric": symmetric}
    recipe = load_recipe(write_recipe(root, data=data, loss=loss, dtype="float64", chunk_tokens=40, output=str(tmp_path / "output")))
    model = build_model(recipe).train()
    batch = first_batch(recipe, model)
    assert sorted(row for _, row in batch["rows"]) == list(range(8))
    result, _ = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))(batch)
    got = gradients(model)
    model.zero_grad(set_to_none=True)
    expected = written_out(model, batch, hard, mask_duplicates, symmetric, 0.2)
    expected.backward()
    assert result.loss.item() == pytest.approx(expected.item(), abs=1e-10)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def written_out(model, batch, hard, mask_duplicates, symmetric, temperature):
    def embed(samples):
        return torch.nn.functional.normalize(model(model.pack([to_features(s) for s in samples])), dim=-1)

    query, target = embed(batch["query"]), embed(batch["target"])
    negatives = embed(batch["negatives"]) if hard else None
    forward, backward = [], []
    for i in range(8):
        own, said = batch["target_ids"][i], batch["query_ids"][i]
        positive = query[i] @ target[i]
        logits = [positive]
        logits += [
            query[i] @ target[j]
            for j in range(8)
            if j != i and not (mask_duplicates and (batch["target_ids"][j] == own or batch["query_ids"][j] == said))
        ]
        if hard:
            for h in range(batch["hard_offsets"][i], batch["hard_offsets"][i + 1]):
                if not (mask_duplicates and batch["hard_ids"][h] == own):
                    logits.append(query[i] @ negatives[h])
        forward.append(torch.logsumexp(torch.stack(logits) / temperature, 0) - positive / temperature)
        logits = [positive] + [
            query[j] @ target[i]
            for j in range(8)
            if j != i and not (mask_duplicates and (batch["target_ids"][j] == own or batch["query_ids"][j] == said))
        ]
        backward.append(torch.logsumexp(torch.stack(logits) / temperature, 0) - positive / temperature)
    loss = torch.stack(forward).mean()
    return (loss + torch.stack(backward).mean()) / 2 if symmetric else loss
