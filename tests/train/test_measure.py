"""Samples measured by image headers and decoded later equal those processed at once, for every family that can."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_models

from vlm2vec import VLM2Vec
from vlm2vec.packing import pack

SIZES = [(56, 56), (97, 61), (20, 90), (9, 2000), (300, 280)]  # exact, resized, below a patch, beyond 200:1, larger


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next"])
def processing(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_models.BUILDERS[request.param](folder)
    return VLM2Vec.from_pretrained(str(folder), device="cpu").processing


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(1)
    for width, height in SIZES:
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{width}.png")
    return [folder / f"{width}.png" for width, _ in SIZES]


def assert_equal(processing, x):
    whole, measured = processing(x), processing.measure(x)
    assert torch.equal(whole.input_ids, measured.input_ids)
    assert whole.vision_patches == measured.vision_patches and whole.length == measured.length
    for name in ("position_ids", "visual_index"):
        a, b = getattr(whole, name), getattr(measured, name)
        assert (a is None and b is None) or torch.equal(a, b), name
    if measured.pending:
        assert "pixel_values" not in measured.vision
        with pytest.raises(ValueError, match="not decoded yet"):
            pack([measured])
        pixels = processing.decode(measured)["pixel_values"]
        assert pixels.dtype == torch.uint8 and pixels.nbytes <= whole.vision["pixel_values"].nbytes / 4
        values = processing.normalised(pixels)
    else:
        values = measured.vision["pixel_values"]
    assert torch.equal(values, whole.vision["pixel_values"]), "bit for bit"
    return measured


def test_images(processing, files):
    usable = files if processing.from_headers and processing.reference_edges else [f for f in files if "9.png" != f.name]
    for file in usable:
        measured = assert_equal(processing, {"text": "what", "image": str(file)})
        assert bool(measured.pending) == processing.from_headers
    assert_equal(processing, {"text": "both", "images": [file.read_bytes() for file in usable[:2]]})


def test_a_picture_in_memory_is_processed_at_once(processing, files):
    with Image.open(files[0]) as image:
        assert not assert_equal(processing, {"text": "what", "image": image.convert("RGB")}).pending
        assert not assert_equal(processing, {"text": "two", "images": [image.convert("RGB"), files[1]]}).pending


def test_videos_of_frame_files(processing, files):
    if processing.video_marker is None or not processing.from_headers:
        pytest.skip("the family takes no videos here")
    for count in (1, 3, 4):
        measured = assert_equal(processing, {"text": "what", "video": [str(f) for f in ([files[1]] * count)]})
        assert [len(frames) for frames in measured.pending] == [count]
    measured = assert_equal(processing, {"text": "<|image_1|> and <|video_1|>", "image": files[0], "video": [files[1], files[4]]})
    assert [len(frames) for frames in measured.pending] == [1, 2]


def test_text_and_markers_that_are_text(processing):
    for x in ("a fox", {"text": "<|image_1|>\nfind", "image": None}):
        measured = processing.measure(x)
        assert not measured.pending and torch.equal(measured.input_ids, processing(x).input_ids)
