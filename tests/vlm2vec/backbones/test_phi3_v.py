"""Phi-3.5-V through `VLM2Vec`: golden embeddings alone and packed in any company, ids, saving, awkward folders and inputs."""

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
from vlm2vec.model import VLM2Vec

TOLERANCE = 1e-5  # against the reference
SAME = 1e-6  # against ourselves


@pytest.fixture(scope="module")
def phi(golden):
    return read(golden, "phi3_v")


@pytest.fixture(scope="module")
def model(phi):
    return VLM2Vec.from_pretrained(phi[0])


@pytest.fixture(scope="module")
def inputs(phi):
    """The seven rows of the mixed batch: three texts, four images of different shapes."""
    return [as_input(phi[0], i) for i in phi[1]["batches"]["mixed"]["items"]]


def test_every_batch_of_the_reference(phi, model):
    folder, cases, expected = phi
    for name, batch in cases["batches"].items():
        rows = [as_input(folder, i) for i in batch["items"]]
        hidden = model.encode(rows, normalize_embeddings=False, convert_to_tensor=True)
        torch.testing.assert_close(hidden, expected[f"{name}.hidden_last_token_unnormalized"], atol=TOLERANCE, rtol=0)
        unit = torch.nn.functional.normalize(hidden, dim=-1)
        torch.testing.assert_close(unit, expected[f"{name}.embeddings"], atol=TOLERANCE, rtol=0)


def test_ids_of_the_reference(phi, model):
    for batch in phi[1]["batches"].values():
        for item in batch["items"]:
            features = model.processing(as_input(phi[0], item))
            ids = features.input_ids.clone()
            if features.visual_index is not None:
                assert len(features.visual_index) == item["n_image_tokens"]
                ids[features.visual_index] = -1
            want = [v for v, n in item["input_ids_run_length"] for _ in range(n)][: item["n_tokens"]]
            assert ids.tolist() == want


def test_the_same_alone_and_in_any_company(model, inputs):
    alone = np.stack([model.encode(x) for x in inputs])
    order = list(range(len(inputs)))
    random.Random(5).shuffle(order)
    shuffled = model.encode([inputs[i] for i in order])
    np.testing.assert_allclose(shuffled, alone[order], atol=SAME, rtol=0)
    np.testing.assert_allclose(model.encode(inputs, batch_size=2), alone, atol=SAME, rtol=0)


def test_num_crops_is_an_option_that_is_saved(phi, model, tmp_path):
    folder = phi[0]
    image = folder / "images" / "img_200x40.png"
    lengths = {}
    for num_crops in (1, 4, 16):
        other = VLM2Vec.from_pretrained(folder, num_crops=num_crops)
        lengths[num_crops] = other.processing({"image": image}).length - 2
    assert lengths == {1: 313, 4: 745, 16: 2485}  # the reference's table for 200 x 40
    other.save_pretrained(tmp_path)
    again = VLM2Vec.from_pretrained(tmp_path)
    assert again.options["num_crops"] == 16
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["num_crops"] == 16
    np.testing.assert_allclose(again.encode("a cat"), model.encode("a cat"), atol=0, rtol=0)
    with pytest.raises(ValueError, match="num_crops=0"):
        VLM2Vec.from_pretrained(folder, num_crops=0)


def test_saved_names_are_the_hubs(phi, model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    published = load_file(phi[0] / "model.safetensors")
    assert set(published) - set(saved) == {"lm_head.weight", "model.vision_embed_tokens.wte.weight"}
    for name, value in saved.items():
        torch.testing.assert_close(value, published[name], atol=0, rtol=0)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Phi3VForCausalLM"] and config["model_type"] == "phi3_v"


def hub_copy(source, target, **changes):
    """A folder as the hub has it: remote code named in config.json and in the processor's file."""
    shutil.copytree(source, target)
    path = target / "config.json"
    code = {"auto_map": {"AutoConfig": "configuration_phi3_v.Phi3VConfig", "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **code, **changes}))
    path = target / "preprocessor_config.json"
    processor = {"auto_map": {"AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **processor}))
    return target


def test_a_folder_with_remote_code_loads_without_running_it(phi, model, tmp_path):
    folder = hub_copy(phi[0], tmp_path / "hub")
    for name in ("configuration_phi3_v.py", "modeling_phi3_v.py", "processing_phi3_v.py"):
        (folder / name).write_text("raise SystemExit('remote code ran')\n")
    other = VLM2Vec.from_pretrained(folder)
    np.testing.assert_allclose(other.encode("a cat"), model.encode("a cat"), atol=0, rtol=0)
    other.save_pretrained(tmp_path / "saved")
    for name in ("config.json", "preprocessor_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "saved" / name).read_text())


def test_weights_that_do_not_fit_are_listed(phi, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(phi[0], tmp_path / "bad")
    weights = load_file(phi[0] / "model.safetensors")
    del weights["model.vision_embed_tokens.glb_GN"]
    weights["model.layers.0.mlp.side_proj.weight"] = torch.zeros(2, 2)
    save_file(weights, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="layers.0.mlp.side_proj.weight") as error:
        VLM2Vec.from_pretrained(tmp_path / "bad")
    assert "glb_GN" in str(error.value)


def test_a_marker_without_an_image(model):
    with pytest.raises(ValueError, match="1 image markers and 0 images"):
        model.encode("<|image_1|>\nFind it.\n")
    # WebQA's and EDIS's queries carry one: with the image said to be absent the marker is words, as the reference has it
    features = model.processing({"text": "<|image_1|>\nFind it.\n", "image": None})
    assert features.visual_index is None
    assert features.input_ids.tolist() == model.processing.tokenizer("<|image_1|>\nFind it.\n")["input_ids"]


def test_an_image_without_a_marker_comes_first_with_a_newline(model, phi):
    image = phi[0] / "images" / "img_112x56.png"
    bare = model.processing({"text": "what is it?", "image": image})
    marked = model.processing({"text": "<|image_1|>\nwhat is it?", "image": image})
    assert bare.input_ids.tolist() == marked.input_ids.tolist()
    assert bare.input_ids[0] == model.processing.tokenizer.bos_token_id


def test_two_images_and_odd_text(model, phi):
    """Two markers, one behind the other, and a NUL in the text, which a splitting character would trip over."""
    images = [phi[0] / "images" / n for n in ("img_56x84.png", "img_112x56.png")]
    features = model.processing({"text": "<|image_1|><|image_2|>a\0b", "images": images})
    assert len(features.visual_index) == 757 + 457
    bos = model.processing.tokenizer.bos_token_id
    assert [features.input_ids[i].item() for i in (0, 758, 758 + 458)] == [bos] * 3
    embedding = model.encode({"text": "<|image_1|><|image_2|>a\0b", "images": images})
    swapped = model.encode({"text": "<|image_1|><|image_2|>a\0b", "images": images[::-1]})
    assert np.isfinite(embedding).all() and np.abs(embedding - swapped).max() > 1e-3


def test_long_text_is_cut_around_the_image(model, phi):
    other = VLM2Vec.from_pretrained(phi[0], max_length=470)
    image = phi[0] / "images" / "img_112x56.png"
    with pytest.warns(UserWarning, match="cut to max_length=470"):
        features = other.processing({"text": "<|image_1|>\n" + "word " * 60, "image": image})
    assert features.length == 470 and len(features.visual_index) == 457
    with pytest.raises(ValueError, match="never cut"):
        VLM2Vec.from_pretrained(phi[0], max_length=400).processing({"image": image})


def test_processing_travels_to_workers(model, phi):
    processing = pickle.loads(pickle.dumps(model.processing))
    x = {"text": "<|image_1|>\nRepresent the given image.\n", "image": phi[0] / "images" / "img_112x56.png"}
    features = pickle.loads(pickle.dumps(processing(x)))
    assert torch.equal(features.input_ids, model.processing(x).input_ids)
    assert features.vision_patches == 3 * 576


def test_bf16_stays_near(model, phi, inputs):
    low = VLM2Vec.from_pretrained(phi[0], dtype="bfloat16")
    few = inputs[:4]
    cosine = (low.encode(few) * model.encode(few)).sum(-1)
    assert low.dtype == torch.bfloat16 and (cosine > 0.98).all(), cosine


def test_float64_does_not_know_its_neighbours(phi):
    """In float64 the packed batch agrees with itself to rounding: whatever differs in float32 is rounding, not leakage."""
    model = VLM2Vec.from_pretrained(phi[0], dtype=torch.float64)
    image = Image.open(phi[0] / "images" / "img_20x17_tiny.png")
    features = model.preprocess(["a cat", {"text": "<|image_1|>\nwhat?", "image": image}, "two dogs on a bench"])
    with torch.no_grad():
        together = model(model.pack(features))
        alone = torch.cat([model(model.pack([f])) for f in features])
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, alone, atol=1e-11, rtol=1e-11)


def test_unusual_image_modes(model, phi):
    """Palette, grey and alpha come through the same door: they equal their RGB conversion."""
    rgb = Image.open(phi[0] / "images" / "img_20x17_tiny.png")
    for mode in ("P", "L", "CMYK"):
        image = rgb.convert(mode)
        first = model.processing({"image": image}).vision["pixel_values"]
        second = model.processing({"image": image.convert("RGB")}).vision["pixel_values"]
        assert torch.equal(first, second)


def test_frozen_tower_features_can_be_reused(model, inputs):
    packed = model.pack(model.preprocess(inputs[:4]))
    with torch.no_grad():
        features = model.vision(packed)
        torch.testing.assert_close(model(packed, vision_features=features), model(packed), atol=0, rtol=0)
        assert model.vision(model.pack(model.preprocess(["text"]))) is None
