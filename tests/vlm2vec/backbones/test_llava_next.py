"""LLaVA-Next through `VLM2Vec`: golden embeddings and pixels, tile counts that differ in one batch, options, saving."""

import json
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.helpers.golden_files import as_input, read
from tests.helpers.versions import needs_pillow_13
from vlm2vec.backbones import clip
from vlm2vec.backbones.llava_next import image_tokens
from vlm2vec.model import VLM2Vec

TOLERANCE = 1e-5  # against the reference
SAME = 1e-6  # against ourselves
# The reference itself is wrong here: a text row's dummy features fill the first image's tokens.
MISALIGNED = "mixed_text_first_low_misaligned"


@pytest.fixture(scope="module")
def llava(golden):
    return read(golden, "llava_next")


@pytest.fixture(scope="module")
def models(llava):
    """By the reference's image_resolution option."""
    return {r: VLM2Vec.from_pretrained(llava[0], resolution=r) for r in (None, "low")}


@pytest.fixture(scope="module")
def model(models):
    return models[None]


@pytest.fixture(scope="module")
def mixed(llava):
    """Every single row, at its own size: three texts, five images of 3, 3, 4, 3 and 5 tiles, which the reference cannot batch."""
    batches = llava[1]["batches"]
    return [as_input(llava[0], b["items"][0]) for n, b in batches.items() if n.startswith("single_native.")]


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@needs_pillow_13
def test_every_batch_of_the_reference(llava, models):
    folder, cases, expected = llava
    for name, batch in cases["batches"].items():
        if name == MISALIGNED:
            continue
        rows = [as_input(folder, i) for i in batch["items"]]
        model = models[batch["image_resolution"]]
        hidden = model.encode(rows, normalize_embeddings=False, convert_to_tensor=True)
        torch.testing.assert_close(hidden, expected[f"{name}.hidden_last_token_unnormalized"], atol=TOLERANCE, rtol=0)
        unit = torch.nn.functional.normalize(hidden, dim=-1)
        torch.testing.assert_close(unit, expected[f"{name}.embeddings"], atol=TOLERANCE, rtol=0)


@needs_pillow_13
def test_pixels_and_ids_of_the_reference(llava, models):
    folder, cases, expected = llava
    for name, batch in cases["batches"].items():
        for i, item in enumerate(batch["items"]):
            features = models[batch["image_resolution"]].processing(as_input(folder, item))
            mask = torch.tensor(batch["attention_mask"][i], dtype=torch.bool)
            assert features.input_ids.tolist() == torch.tensor(batch["input_ids"][i])[mask].tolist()
            if item["image"] is None:
                assert features.visual_index is None
                continue
            assert len(features.visual_index) == item["n_image_tokens"]
            assert features.vision["image_sizes"] == [tuple(batch["image_sizes_height_width"][i])]
            if f"{name}.pixel_values" in expected:
                want = expected[f"{name}.pixel_values"][i]
                torch.testing.assert_close(features.vision["pixel_values"], want, atol=1e-6, rtol=0)


def test_the_same_alone_and_with_any_tile_counts(model, mixed):
    alone = np.stack([model.encode(x) for x in mixed])
    order = list(range(len(mixed)))
    random.Random(3).shuffle(order)
    np.testing.assert_allclose(model.encode([mixed[i] for i in order]), alone[order], atol=SAME, rtol=0)
    np.testing.assert_allclose(model.encode(mixed, batch_size=3), alone, atol=SAME, rtol=0)


def test_anyres_table_of_the_reference(llava, model):
    processing = model.processing
    for height, width, tiles, grid, tokens in llava[1]["anyres_table"]["rows"]:
        assert list(processing._grid(width, height)) == grid
        lines, columns = image_tokens(width, height, tuple(grid), 4)
        assert 16 + lines * (columns + 1) == tokens, (width, height)
        assert grid[0] * grid[1] + 1 == tiles


# One row of pixels, a strip each way, a tile's own size, a size just past a grid.
@pytest.mark.parametrize("size", [(1, 1), (900, 3), (3, 900), (56, 56), (113, 112), (500, 499), (1000, 1)])
def test_counted_tokens_are_the_features_that_come(model, size):
    packed = model.pack([model.processing({"text": "<|image_1|> what?", "image": noise(*size)})])
    with torch.no_grad():
        features = model.vision(packed)
    assert len(features) == len(packed.visual_index)


def test_features_equal_transformers_own(model, mixed):
    """The tower is left at the feature layer; transformers runs it whole and picks the layer afterwards."""
    packed = model.pack(model.preprocess(mixed))
    with torch.no_grad():
        ours = model.vision(packed)
        sizes = torch.tensor(packed.vision["image_sizes"])
        theirs = torch.cat(model.model.get_image_features(packed.vision["pixel_values"], sizes).pooler_output)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_clip_layers_are_counted_as_transformers_counts(model):
    tower = model.model.vision_tower
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        every = tower(pixels, output_hidden_states=True).hidden_states
        for layer in (0, 1, -1, -2, -4):
            (state,) = clip.hidden_states(tower, pixels, [layer])
            torch.testing.assert_close(state, every[layer], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="expected -4 to 3"):
        clip.hidden_states(tower, pixels, [4])


@pytest.mark.parametrize("wanted, size", [("high", (1344, 1344)), ("mid", (672, 672)), ("low", (128, 128)), ((30, 60), (30, 60))])
def test_resolutions_ignore_the_ratio(llava, wanted, size):
    model = VLM2Vec.from_pretrained(llava[0], resolution=wanted)
    image = noise(40, 90)
    resized = model.processing.resize(image)
    assert resized.size == size
    np.testing.assert_array_equal(np.array(resized), np.array(image.resize(size, Image.Resampling.BICUBIC)))


def test_without_a_resolution_only_giants_are_squashed(llava, model):
    assert model.processing.resize(noise(1344, 20)).size == (1344, 20)
    assert model.processing.resize(noise(1345, 20)).size == (1344, 1344)
    native = VLM2Vec.from_pretrained(llava[0], resolution="native")
    assert native.processing.resize(noise(1345, 20)).size == (1345, 20)
    with pytest.raises(ValueError, match="resolution='huge'"):
        VLM2Vec.from_pretrained(llava[0], resolution="huge")


def test_the_published_checkpoint_is_fed_as_it_was_trained():
    from vlm2vec.backbones.llava_next import LlavaNext

    assert LlavaNext().options_for("TIGER-Lab/VLM2Vec-LLaVa-Next", {}) == {"resolution": "high"}
    assert LlavaNext().options_for("/models/VLM2Vec-LLaVa-Next/", {}) == {"resolution": "high"}
    assert LlavaNext().options_for("llava-hf/llava-v1.6-mistral-7b-hf", {}) == {}


def test_save_and_reload(llava, models, mixed, tmp_path):
    models["low"].save_pretrained(tmp_path)
    again = VLM2Vec.from_pretrained(tmp_path)
    assert again.options["resolution"] == "low"
    few = mixed[:5]
    np.testing.assert_allclose(again.encode(few), models["low"].encode(few), atol=SAME, rtol=0)
    saved, published = load_file(tmp_path / "model.safetensors"), load_file(llava[0] / "model.safetensors")
    assert set(published) - set(saved) == {"language_model.lm_head.weight"} and not set(saved) - set(published)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlavaNextForConditionalGeneration"]
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tmp_path)  # what other programs load the folder with
    out = processor(images=noise(75, 101), text="<image>", return_tensors="pt")
    assert (out["input_ids"] == processor.image_token_id).sum().item() == 72


def test_a_wrong_image_token_is_noticed(llava, tmp_path):
    shutil.copytree(llava[0], tmp_path / "bad")
    path = tmp_path / "bad" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_index": 5}))
    with pytest.raises(ValueError, match="image tokens are 5"):
        VLM2Vec.from_pretrained(tmp_path / "bad")


def test_markers(model):
    with pytest.raises(ValueError, match="1 image markers and 0 images"):
        model.encode("<|image_1|>\nFind it.\n")
    native = model.processing({"text": "<image>\nwhat?", "image": noise(20, 20)})
    mmeb = model.processing({"text": "<|image_1|>\nwhat?", "image": noise(20, 20)})
    assert native.input_ids.tolist() == mmeb.input_ids.tolist()
    # WebQA and EDIS: the marker stays one ordinary token
    words = model.processing({"text": "<|image_1|>\nFind it.\n", "image": None})
    assert words.visual_index is None and (words.input_ids == model.processing.image_token_id).sum() == 1
    assert np.isfinite(model.encode({"text": "<|image_1|>\nFind it.\n", "image": None})).all()


def test_a_video_is_its_frames(model):
    frames = [noise(30, 20, seed) for seed in range(3)]
    video = model.processing({"text": "<|video_1|> what happens?", "video": frames})
    images = model.processing({"text": "<|image_1|><|image_2|><|image_3|> what happens?", "images": frames})
    assert torch.equal(video.input_ids, images.input_ids)
    assert torch.equal(video.vision["pixel_values"], images.vision["pixel_values"])
    with pytest.raises(ValueError, match="left over"):
        model.processing({"text": "<|video_1|>", "videos": [frames, frames]})


def test_processing_travels_to_workers(model):
    processing = pickle.loads(pickle.dumps(model.processing))
    x = {"text": "<|image_1|>\nwhat?", "image": noise(100, 60)}
    features = pickle.loads(pickle.dumps(processing(x)))
    assert torch.equal(features.vision["pixel_values"], model.processing(x).vision["pixel_values"])


def test_gradients_reach_the_projector_and_the_newline(llava, mixed):
    model = VLM2Vec.from_pretrained(llava[0]).train()
    packed = model.pack(model.preprocess(mixed[:6]))
    model(packed).square().sum().backward()
    plain = {n: p.grad for n, p in model.model.named_parameters() if p.grad is not None}
    assert {"image_newline", "multi_modal_projector.linear_1.weight"} <= set(plain)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(packed).square().sum().backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(model.model.get_parameter(name).grad, gradient, atol=1e-4, rtol=1e-4)
