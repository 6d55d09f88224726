"""Images streamed by the chunk where families cut them into tiles (LLaVA-Next) and crops (Phi-3.5-V): as `test_media` for patches."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from contrastive_kernels import info_nce
from tests.helpers.measured_peak import measured
from tests.helpers.streaming import (
    Whole,
    assert_same,
    damage,
    equals_images_decoded_at_once,
    failing_step,
    keeps_host_memory_within_its_bound,
    run_step,
    without_row,
)
from tests.helpers.tiny_recipe import first_batch, gradients, write_recipe
from train.build import build_model
from train.data.rows import collate, to_features
from train.plan import batch as plan_batch
from train.plan.batch import decoded_total, is_measured
from train.plan.simulate import simulate
from train.recipe.keys import Assumed, Content, Rows
from train.recipe.schema import load_recipe
from train.step import ContrastiveStep

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module", params=["llava_next", "phi3_v"])
def root(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_recipe(folder, request.param)
    return folder


@pytest.fixture
def prepared(root):
    def make(**changes):
        recipe = load_recipe(write_recipe(root, **{"dtype": "float64", "retain": 0, "seed": 3} | changes))
        return recipe, build_model(recipe).train()

    return make


def pixel_bytes(batch):
    """Bytes of each query's decoded images: all of LLaVA's tiles, and Phi's without the global view, which the device makes."""
    count = {"tiles": sum, "grids": lambda grids: sum(down * across for down, across in grids)}
    visions = [sample["vision"] for sample in batch["query"]]
    return [sum(count[name](vision[name]) for name in count if name in vision) * 3 * 28**2 for vision in visions]


@pytest.mark.parametrize(
    "changes",
    [
        {"media_mib": 0.0},  # everything is decoded twice
        {"media_mib": 0.05},  # some images are kept
        {"retain": 2},
        {"freeze_vision": True},
        {"freeze_vision": True, "keep_mib": 0.0},
        {"gradient_checkpointing": True},
        {"chunk_rows": 3, "lora": {"r": 2, "vision": True, "dropout": 0.0}},
    ],
    ids=str,
)
def test_gradients_are_those_of_images_decoded_at_once(prepared, changes):
    recipe, model = prepared(**changes)
    streamed = first_batch(recipe, model)
    assert sum(bool(sample["pending"]) for sample in streamed["query"]) >= 4
    assert not any("pixel_values" in sample["vision"] for sample in streamed["query"]), "the batch carries no pixels"
    equals_images_decoded_at_once(recipe, model, streamed)


def test_embeddings_are_those_of_images_decoded_at_once(prepared):
    recipe, model = prepared(dtype="float32")
    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))
    embedded = []
    for processing in (model.processing, Whole(model.processing)):
        batch = first_batch(recipe, model, processing=processing)
        side = step.media.side(batch["query"], range(8), lambda row, message: None)
        with torch.no_grad():
            embedded.append(step.embed(side, [0, 1, 2, 3, 4, 5, 6, 7]))
    assert torch.equal(*embedded), "pixels are equal to the bit, and so is all that comes of them"


def test_host_memory_is_bounded_and_what_fits_is_decoded_once(prepared):
    recipe, model = prepared(global_batch=24, interleave_batch_size=24, chunk_tokens=60)
    batch = first_batch(recipe, model, step=1)
    sizes = pixel_bytes(batch)
    assert len(sizes) == 24 and min(sizes) > 0 and len(set(sizes)) > 1, "the block of this step is the source with pictures"
    keeps_host_memory_within_its_bound(recipe, model, batch, sizes)


@pytest.mark.parametrize("keep,decodes", [("all", 24), ("none", 48)])
def test_a_frozen_towers_images_are_decoded_again_only_where_nothing_is_kept(prepared, keep, decodes):
    recipe, model = prepared(global_batch=24, interleave_batch_size=24, chunk_tokens=60, freeze_vision=True, media_mib=0.0)
    recipe.keep_mib = {"all": 64.0, "none": 0.0}[keep]
    step, _, _ = run_step(recipe, model, first_batch(recipe, model, step=1))
    assert step.media.decoded == decodes


def test_an_image_damaged_behind_its_header_costs_its_row(prepared, root):
    recipe, model = prepared(media_mib=0.0)
    batch = first_batch(recipe, model)
    spoiled = next(i for i, sample in enumerate(batch["query"]) if sample["pending"])
    row = batch["rows"][spoiled][1]
    path, whole = damage(root, row)
    try:
        _, loss, got = run_step(recipe, model, batch)
    finally:
        path.write_bytes(whole)
    (error,) = batch["errors"]
    assert f"Pictures, row {row}: image" in error and "truncated" in error
    assert batch["kept"].tolist() == [i != spoiled for i in range(8)]
    _, expected_loss, expected = run_step(recipe, model, without_row(batch, spoiled))
    assert loss == pytest.approx(expected_loss, abs=1e-12)
    assert_same(got, expected)


def test_a_row_that_fails_in_the_second_pass_trains_nothing(prepared):
    recipe, model = prepared(media_mib=0.0)
    batch, spoiled, step, call = failing_step(recipe, model, ValueError("image gone"), 2)
    result, _ = call()
    got = gradients(model)
    (line,) = batch["errors"]
    assert "image gone; it could be read before in this step, so its gradient is left out" in line
    model.zero_grad(set_to_none=True)
    whole = first_batch(recipe, model, processing=Whole(model.processing))
    sides = [model(model.pack([to_features(sample) for sample in whole[name]])) for name in ("query", "target")]
    dead = torch.arange(8)[:, None] == spoiled
    loss = info_nce(*sides, temperature=recipe.loss.temperature, normalize=True, target_ids=torch.from_numpy(whole["target_ids"]))
    assert result.loss.item() == pytest.approx(loss.item(), abs=1e-12)
    d_query, d_target = torch.autograd.grad(loss, sides, retain_graph=True)
    torch.autograd.backward(sides, [d_query.masked_fill(dead, 0.0), d_target])
    assert_same(got, gradients(model))


def company(root, processing):
    """Rows with several images, encoded bytes, a picture in memory beside files, one on either side, and none."""
    images = root / "images"
    with Image.open(images / "2.jpg") as opened:
        memory = opened.convert("RGB")
    queries = [
        {"text": "<|image_1|> and <|image_2|>, which?", "images": [images / "0.jpg", images / "3.jpg"]},
        {"text": "one of bytes", "image": (images / "4.jpg").read_bytes()},
        {"text": "in memory", "image": memory},
        {"text": "no picture at all"},
    ]
    targets = [{"text": "this"}, {"text": "that", "image": images / "1.jpg"}, {"text": "", "image": images / "2.jpg"}, {"text": "none"}]
    samples = []
    for row, (query, target) in enumerate(zip(queries, targets, strict=True)):
        made = {"query": processing.measure(query), "target": processing.measure(target), "negatives": [], "negative_ids": []}
        samples.append({"source": 0, "row": row, "error": None, "query_id": row, "target_id": row} | made)
    return collate(samples)


def test_several_images_and_a_picture_in_memory_share_a_chunk(prepared, root):
    recipe, model = prepared(chunk_tokens=10**6, media_mib=0.0)  # one chunk a side: pixels as bytes and as floats in one
    streamed = company(root, model.processing)
    assert [len(sample["pending"]) for sample in streamed["query"]] == [2, 1, 0, 0]
    _, loss, got = run_step(recipe, model, streamed)
    _, expected_loss, expected = run_step(recipe, model, company(root, Whole(model.processing)))
    assert loss == pytest.approx(expected_loss, abs=1e-12)
    assert_same(got, expected)


def test_a_plan_counts_the_bytes_that_a_step_decodes(root, prepared):
    recipe, model = prepared()
    batch = first_batch(recipe, model)
    step, _, _ = run_step(recipe, model, batch)
    assert is_measured(batch) and decoded_total(model.processing, batch)[0] == sum(pixel_bytes(batch)) == step.media.peak_bytes


def test_a_plan_predicts_the_peak_of_a_run(root):
    recipe = load_recipe(write_recipe(root))
    plan = simulate(recipe, None, make_batch=lambda processing: plan_batch.first_batch(recipe, processing, 1), flash=False)
    assert 1.0 <= plan.peak / measured(recipe) <= 1.02


def test_a_plan_of_assumed_rows_has_their_tokens_and_bytes(root, prepared):
    recipe, model = prepared()
    rows = Assumed([Rows(1.0, Content(7, image=[61, 140], images=2), Content(3))])
    assumed = plan_batch.assumed_batch(replace(recipe, plan=rows), model.processing, 4)
    real = model.processing({"text": "<|image_1|><|image_2|>", "images": [root / "images" / "3.jpg"] * 2})  # 61 x 140
    assert [len(sample["visual_index"]) for sample in assumed["query"]] == [len(real.visual_index)] * 2
    assert [sample["vision_patches"] for sample in assumed["query"]] == [real.vision_patches] * 2
    assert is_measured(assumed) and decoded_total(model.processing, assumed) == (2 * pixel_bytes(assumed)[0], pixel_bytes(assumed)[0])


def test_a_chunk_of_bytes_and_floats_is_planned(root, prepared):
    recipe, model = prepared(chunk_tokens=10**6, media_mib=0.0)
    batch = company(root, model.processing)
    plan = simulate(recipe, batch)
    alone = simulate(recipe, company(root, Whole(model.processing)))
    assert plan.peak == pytest.approx(alone.peak, rel=0.02) and plan.cost.flops == alone.cost.flops


def test_floats_from_decoding_do_not_pass_for_normalised_pixels(prepared):
    recipe, model = prepared()
    batch = first_batch(recipe, model)
    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))
    decode = model.processing.decode
    step.media.processing = SimpleNamespace(decode=lambda features: {"pixel_values": decode(features)["pixel_values"].float()})
    sample = next(sample for sample in batch["query"] if sample["pending"])
    with pytest.raises(ValueError, match="expected 8-bit pixels"):
        step.media.submit(to_features(sample)).result()
