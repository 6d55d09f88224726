"""Images streamed by the chunk: the same gradients as decoded at once, host memory within its bound, bad images left out."""

import logging
import struct
import zlib

import numpy as np
import pytest
import torch

from contrastive_kernels import info_nce
from tests.helpers.streaming import (
    Whole,
    assert_same,
    damage,
    equals_images_decoded_at_once,
    failing_step,
    keeps_host_memory_within_its_bound,
    largest_chunk,
    run_step,
    without_row,
)
from tests.helpers.tiny_recipe import first_batch, gradients, write_recipe
from train.build import build_model
from train.data.rows import to_features
from train.recipe.schema import load_recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_recipe(folder)
    return folder


@pytest.fixture
def prepared(root):
    def make(**changes):
        changes = {"dtype": "float64", "retain": 0, "seed": 3} | changes
        recipe = load_recipe(write_recipe(root, **changes))
        return recipe, build_model(recipe).train()

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {"media_mib": 0.0},  # everything is decoded twice
        {"media_mib": 0.02},  # some images are kept
        {"retain": 2},
        {"retain": "all"},
        {"freeze_vision": True},
        {"freeze_vision": True, "keep_mib": 0.0},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "freeze_vision": True, "retain": 1},
        {"chunk_rows": 3, "lora": {"r": 2, "vision": True, "dropout": 0.0}},
    ],
    ids=str,
)
def test_gradients_are_those_of_images_decoded_at_once(prepared, changes):
    recipe, model = prepared(**changes)
    streamed = first_batch(recipe, model)
    assert sum(bool(sample["pending"]) for sample in streamed["query"]) >= 4
    equals_images_decoded_at_once(recipe, model, streamed)


def test_host_memory_is_bounded_and_what_fits_is_decoded_once(prepared):
    recipe, model = prepared(global_batch=24, interleave_batch_size=24, chunk_tokens=60)
    batch = first_batch(recipe, model, step=1)
    sizes = [3 * 14**2 * int(np.prod(sample["vision"]["grid_thw"])) for sample in batch["query"] if sample["pending"]]
    assert len(sizes) == 24, "the block of this step is the source with pictures"
    keeps_host_memory_within_its_bound(recipe, model, batch, sizes)


# What is kept between the passes: features and pixels within their bounds; "half" of all features.
@pytest.mark.parametrize(
    "keep,media_mib,decodes",
    [
        ("all", 64.0, 1),  # features are kept, so pixels need not be
        ("all", 0.0, 1),
        ("none", 64.0, 1),  # pixels are kept instead
        ("none", 0.0, 2),
        ("half", 64.0, 1),
        ("half", 0.0, 1.5),
    ],
)
@pytest.mark.parametrize("retain", [0, 2, "all"])
def test_a_frozen_towers_images_are_decoded_again_only_where_nothing_is_kept(prepared, keep, media_mib, decodes, retain):
    recipe, model = prepared(
        global_batch=24, interleave_batch_size=24, chunk_tokens=60, freeze_vision=True, media_mib=media_mib, retain=retain
    )
    batch = first_batch(recipe, model, step=1)
    sizes = [3 * 14**2 * int(np.prod(sample["vision"]["grid_thw"])) for sample in batch["query"]]
    tokens = [len(sample["visual_index"]) for sample in batch["query"]]
    recipe.keep_mib = {"all": 64.0, "none": 0.0, "half": sum(tokens) / 2 * model.embedding_dim * 8 / 2**20}[keep]
    step, _, got = run_step(recipe, model, batch)
    if retain == "all" or decodes != 1.5:
        assert step.media.decoded == (24 if retain == "all" else 24 * decodes)
    else:
        assert 24 < step.media.decoded < 48
    largest = largest_chunk(step, batch, sizes)
    kept = {"all": 0, "half": sum(sizes) / 2 + largest, "none": sum(sizes)}[keep] if media_mib else 0
    assert step.media.peak_bytes <= kept + 2 * largest, "the chunk in use, the next one, and what the second pass will ask for"
    assert keep == "none" or 2 * largest < sum(sizes) / 2
    assert (step.media.kept_bytes, step.media._held) == (0, 0)
    recipe.keep_mib, recipe.media_mib, recipe.retain = 64.0, 64.0, "all"
    assert_same(got, run_step(recipe, model, batch)[2])


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_image_damaged_behind_its_header_costs_its_row(prepared, root, symmetric):
    recipe, model = prepared(loss={"symmetric": symmetric}, media_mib=0.0)
    batch = first_batch(recipe, model)
    spoiled = next(i for i, sample in enumerate(batch["query"]) if sample["pending"])
    source, row = batch["rows"][spoiled]
    path, whole = damage(root, row)
    try:
        _, loss, got = run_step(recipe, model, batch)
    finally:
        path.write_bytes(whole)
    assert batch["errors"] == [next(e for e in batch["errors"] if f"Pictures, row {row}: image" in e and "truncated" in e)]
    assert batch["kept"].tolist() == [i != spoiled for i in range(8)]
    without = without_row(batch, spoiled)
    _, expected_loss, expected = run_step(recipe, model, without)
    assert loss == pytest.approx(expected_loss, abs=1e-12)
    assert_same(got, expected)


ERRORS = [
    struct.error("unpack requires 4 bytes"),
    zlib.error("Error -3"),
    EOFError("no more"),
    KeyError("tRNS"),
    IndexError("out of range"),
    SyntaxError("broken PNG"),
    RuntimeError("decoder"),
    MemoryError("20 GB"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_decoder_raises_costs_one_row(prepared, error):
    recipe, model = prepared()
    batch, spoiled, step, call = failing_step(recipe, model, error, 1)
    call()
    source, row = batch["rows"][spoiled]
    (line,) = batch["errors"]
    assert line.startswith(f"Pictures, row {row}: image ") and f"{row}.jpg: {type(error).__name__}: {error}" in line
    assert batch["kept"].tolist() == [i != spoiled for i in range(8)]
    recipe.data.strict = True
    _, _, _, call = failing_step(recipe, model, error, 1)
    with pytest.raises(ValueError, match=f"{type(error).__name__}.*data.strict"):
        call()


@pytest.mark.parametrize("changes", [{}, {"freeze_vision": True, "keep_mib": 0.0}, {"gradient_checkpointing": True}], ids=str)
def test_a_row_that_fails_in_the_second_pass_trains_nothing(prepared, changes):
    """It was a row of the loss, so the others' gradients stand; grey pixels in its place must not move the weights."""
    recipe, model = prepared(media_mib=0.0, **changes)
    batch, spoiled, step, call = failing_step(recipe, model, ValueError("image gone"), 2)
    result, _ = call()
    got = gradients(model)
    (line,) = batch["errors"]
    assert "image gone; it could be read before in this step, so its gradient is left out" in line

    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_disable()
    whole = first_batch(recipe, model, processing=Whole(model.processing))
    sides = [model(model.pack([to_features(sample) for sample in whole[name]])) for name in ("query", "target")]
    dead = torch.arange(8)[:, None] == spoiled
    loss = info_nce(*sides, temperature=recipe.loss.temperature, normalize=True, target_ids=torch.from_numpy(whole["target_ids"]))
    assert result.loss.item() == pytest.approx(loss.item(), abs=1e-12), "the row still was a row of the loss"
    d_query, d_target = torch.autograd.grad(loss, sides, retain_graph=True)
    assert d_query[spoiled].abs().max() > 1e-6
    torch.autograd.backward(sides, [d_query.masked_fill(dead, 0.0), d_target])
    assert_same(got, gradients(model))


def test_a_row_that_fails_in_the_second_pass_stops_a_strict_run(prepared):
    recipe, model = prepared(media_mib=0.0)
    recipe.data.strict = True
    _, _, step, call = failing_step(recipe, model, zlib.error("Error -3"), 2)
    with pytest.raises(ValueError, match="error: Error -3; it could be read before.*data.strict"):
        call()


def test_strict_stops_at_a_damaged_image(prepared, root):
    recipe, model = prepared()
    recipe.data.strict = True
    batch = first_batch(recipe, model)
    path, whole = damage(root, next(row for source, row in batch["rows"] if source == 0))
    try:
        with pytest.raises(ValueError, match="truncated.*data.strict"):
            run_step(recipe, model, batch)
    finally:
        path.write_bytes(whole)


def test_a_missing_image_is_found_by_its_header_and_logged_once(root, caplog):
    from train.run import run

    recipe = write_recipe(root, output=str(root / "missing"), steps=2, global_batch=24, interleave_batch_size=24, save_steps=9)
    path = root / "images" / "5.jpg"
    whole = path.read_bytes()
    path.unlink()
    try:
        with caplog.at_level(logging.WARNING, logger="train.trainer"):
            assert run([str(recipe)]) == 0
        lines = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
        assert lines and all("Pictures, row 5: image" in line and "no such file" in line for line in lines)
        assert len(lines) == len({line.split(":")[0] for line in lines}), "once a step that draws it"
    finally:
        path.write_bytes(whole)
