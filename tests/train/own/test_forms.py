"""Own data in every form gives the same batches, bit for bit; rows that cannot be read are named and counted alike."""

import itertools

import numpy as np
import pytest
import torch

from tests.helpers.own_data import FORMS, rows, source, write_pictures
from tests.helpers.tiny_models import BUILDERS
from train.data.rows import PairDataset, collate, to_features
from train.data.sampler import BlockSampler
from train.recipe.schema import Data, Source
from vlm2vec.checkpoint.pretrained import describe

BAD = {  # row -> what is said of it
    3: "not an image file",
    4: "no such file",
    5: "query: empty, in ",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("forms")
    (root / "model").mkdir()
    BUILDERS["qwen2_vl"](root / "model")
    write_pictures(root / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        yield root


@pytest.fixture(scope="module")
def processing(place):
    return describe(str(place / "model")).processing


def dataset(place, processing, form, held_out=0, **changes):
    root = place / form.replace(" ", "-")
    told = source(form, root, place / "pictures") if not root.exists() else source.cache[form]
    source.cache[form] = told
    return PairDataset(Data(sources=[Source(**told)], hard_negatives=True, **changes), processing, held_out)


source.cache = {}


def batches(data):
    """Two epochs of the run's batches, collated."""
    sampler = BlockSampler(data.sizes, [1.0], global_batch=8, block=4, steps=2 * data.sizes[0] // 8, seed=1)
    return [collate([data[key] for key in sampler.batch(step)]) for step in range(sampler.steps)]


def same_pattern(a, b):
    """A group's id is of its column's name too, which a shard has its own of: what counts is which are equal."""
    return np.array_equal(a[:, None] == a[None], b[:, None] == b[None])


def decoded(sample, processing):
    features = to_features(sample)
    return processing.decode(features)["pixel_values"] if features.pending else None


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_batches(place, processing, form):
    truth, got = batches(dataset(place, processing, "CSV", held_out=2)), batches(dataset(place, processing, form, held_out=2))
    assert len(truth) == len(got) == 5
    for expected, batch in zip(truth, got):
        assert batch["rows"] == expected["rows"] and batch["kept"].tolist() == expected["kept"].tolist()
        for name in ("grades", "scores", "pairs", "hard_offsets", "query_ids", "target_ids", "hard_ids"):
            assert batch[name].tobytes() == expected[name].tobytes(), name
        assert same_pattern(batch["group_ids"], expected["group_ids"])
        for side in ("query", "target", "negatives"):
            for one, other in zip(batch[side], expected[side], strict=True):
                for name in one:
                    if name not in ("pending", "vision"):
                        assert np.array_equal(one[name], other[name]), (side, name)
                assert repr(one["vision"]) == repr(other["vision"])
                pixels = [decoded(sample, processing) for sample in (one, other)]
                assert pixels[0] is pixels[1] is None or torch.equal(*pixels), side


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_under_a_second_name_is_the_same_picture(place, processing, form):
    data = dataset(place, processing, form)
    samples = {row: data[0, row] for row in range(24) if row not in BAD}
    ids = {row: sample["target_id"] for row, sample in samples.items()}
    assert [pair for pair in itertools.combinations(ids, 2) if ids[pair[0]] == ids[pair[1]]] == [(10, 14)]
    assert samples[7]["negative_ids"][0] == ids[10], "row 7's negative is the copy"
    assert samples[17]["negative_ids"] == [ids[0], ids[1]]


@pytest.mark.parametrize("form", FORMS)
def test_bad_rows_are_named_and_counted(place, processing, form):
    data = dataset(place, processing, form)
    found = {row: data[0, row]["error"] for row in range(24)}
    bad = {row: error for row, error in found.items() if error}
    assert sorted(bad) == sorted(BAD), bad
    for row, error in bad.items():
        assert error.startswith(f"shop, row {row}: ") and len(error) < 500
        empty = row == 4 and form in ("save_to_disk", "hub", "WebDataset")  # a picture that is not there has no bytes
        assert ("empty" if empty else BAD[row]) in error, error
    data.data.strict = True
    with pytest.raises(ValueError, match="shop, row 3: .*data.strict"):
        data[0, 3]


def test_what_the_model_is_fed(place, processing):
    data = dataset(place, processing, "CSV")
    query, target, negatives = data.tables[0].row(1, None)
    assert query == {"text": "Find: eine Tüte\nim Regen 1", "image": None}
    assert target == {"text": "<|image_1|>\nShow it.\n", "image": str(place / "pictures" / "001.jpg")}
    assert [n["image"] for n in negatives] == [str(place / "pictures" / name) for name in ("008.jpg", "012.jpg")]
    assert all(n["text"] == target["text"] for n in negatives), "a picture's words are the target's"
    assert data[0, 1]["scores"] == [4.5, 0.25, -1.0] and data[0, 1]["grade"] == 0.1
    texts = [row["caption"] for row in rows()]
    assert [data.tables[0].row(i, None)[0]["text"] for i in (0, 2, 3, 4)] == [f"Find: {texts[i]}" for i in (0, 2, 3, 4)]


def test_workers_read_as_this_process_does(place, processing):
    """Tables cross to other processes, and read on there."""
    for form in ("JSONL", "WebDataset", "CSV"):
        data = dataset(place, processing, form)
        loader = torch.utils.data.DataLoader(
            data, batch_sampler=[[(0, 1), (0, 2)], [(0, 6), (0, 7)]], collate_fn=collate, num_workers=2, multiprocessing_context="fork"
        )
        for batch, rows_of in zip(loader, ([1, 2], [6, 7])):
            truth = collate([data[0, row] for row in rows_of])
            assert np.array_equal(batch["target_ids"], truth["target_ids"]) and batch["rows"] == [(0, row) for row in rows_of]
            assert batch["kept"].all()
