"""Samples measured by image headers and decoded later equal those processed at once, for every family that can."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_recipe import tiny_models
from vlm2vec import VLM2Vec
from vlm2vec.packing import pack

SIZES = [(56, 56), (97, 61), (20, 90), (9, 2000), (300, 280)]  # exact, resized, below a patch, beyond 200:1, larger


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model's folder by its family, made once."""

    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        tiny_models.BUILDERS[family](folder)
        return str(folder)

    return make


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava_next", "phi3_v"])
def processing(request, folders):
    return VLM2Vec.from_pretrained(folders(request.param), device="cpu").processing


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
        assert pixels.shape == processing.decoded_shape(measured)
        values = processing.normalised(pixels, measured.vision)
        assert values.shape == processing.normalised_shape(pixels.shape, measured.vision)
    else:
        values = measured.vision["pixel_values"]
    assert torch.equal(values, whole.vision["pixel_values"]), "bit for bit"
    return measured


def test_images(processing, files):
    usable = files if getattr(processing, "reference_edges", True) else [f for f in files if "9.png" != f.name]
    for file in usable:
        assert assert_equal(processing, {"text": "what", "image": str(file)}).pending
    assert_equal(processing, {"text": "both", "images": [file.read_bytes() for file in usable[:2]]})


def orientation(picture, value):
    exif = picture.getexif()
    exif[0x0112] = value
    return exif


def test_unusual_pictures(processing, tmp_path):
    """Palette with a transparent colour, alpha, greys of 1, 8 and 16 bits, inks, and cameras that lay on their side."""
    generator = np.random.default_rng(2)
    picture = Image.fromarray(generator.integers(0, 256, (61, 97, 3), dtype=np.uint8))
    alpha = picture.copy()
    alpha.putalpha(Image.fromarray(generator.integers(0, 256, (61, 97), dtype=np.uint8)))
    made = {f"{mode}.png": picture.convert(mode) for mode in ("L", "1", "P", "LA")} | {
        "RGBA.png": alpha,
        "CMYK.jpg": picture.convert("CMYK"),
    }
    made["I16.png"] = Image.fromarray(generator.integers(0, 65536, (61, 97), dtype=np.uint16))
    for name, image in made.items():
        image.save(tmp_path / name, **({"transparency": 3} if name == "P.png" else {}))
    for value in (1, 6, 8):
        picture.save(tmp_path / f"exif{value}.jpg", exif=orientation(picture, value))
    for file in sorted(tmp_path.iterdir()):
        with Image.open(file) as header:
            assert header.size == (97, 61)
        assert assert_equal(processing, {"text": "what", "image": str(file)}).pending, file.name
    assert len(list(tmp_path.iterdir())) == 10


def test_threads_decode_as_one(processing, files):
    """An image processor is shared by the threads that decode."""
    usable = [files[0], files[1], files[4]] * 8
    measured = [processing.measure({"text": "what", "image": file}) for file in usable]
    with ThreadPoolExecutor(8) as pool:
        for together, alone in zip(pool.map(processing.decode, measured), map(processing.decode, measured), strict=True):
            assert torch.equal(together["pixel_values"], alone["pixel_values"])


def test_damage_behind_the_header(processing, tmp_path):
    file = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (61, 97, 3), dtype=np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    measured = processing.measure({"text": "what", "image": file})
    with pytest.raises(ValueError, match="cut.jpg.*truncated"):
        processing.decode(measured)


def test_a_picture_that_is_not_as_its_header_says(processing, files, monkeypatch):
    """Some formats hold several sizes. Qwen resizes to the tokens that were laid out; tiles would be others."""
    measured = processing.measure({"text": "what", "image": files[0]})
    open_one = processing.open
    monkeypatch.setattr(processing, "open", lambda source: open_one(source).resize((30, 200)))
    if "grid_thw" in measured.vision:
        assert processing.decode(measured)["pixel_values"].shape == processing.decoded_shape(measured)
        return
    with pytest.raises(ValueError, match=r"56.png: decoded it has another size than its header says"):
        processing.decode(measured)


def test_a_picture_in_memory_is_processed_at_once(processing, files):
    with Image.open(files[0]) as image:
        assert not assert_equal(processing, {"text": "what", "image": image.convert("RGB")}).pending
        assert not assert_equal(processing, {"text": "two", "images": [image.convert("RGB"), files[1]]}).pending


def test_videos_of_frame_files(processing, files):
    if processing.video_marker is None:
        pytest.skip("the family has no token for videos")
    for count in (1, 3, 4):
        measured = assert_equal(processing, {"text": "what", "video": [str(f) for f in ([files[1]] * count)]})
        assert [len(frames) for frames in measured.pending] == [count]
    measured = assert_equal(processing, {"text": "<|image_1|> and <|video_1|>", "image": files[0], "video": [files[1], files[4]]})
    assert [len(frames) for frames in measured.pending] == [1, 2]
    with Image.open(files[1]) as seen:
        for mixed in ([seen.convert("RGB"), files[1]], [files[1], seen.convert("RGB")]):
            assert not assert_equal(processing, {"text": "what", "video": mixed}).pending, "a frame in memory is not decoded later"


def test_text_and_markers_that_are_text(processing):
    for x in ("a fox", {"text": "<|image_1|>\nfind", "image": None}):
        measured = processing.measure(x)
        assert not measured.pending and torch.equal(measured.input_ids, processing(x).input_ids)


def test_a_video_of_llava_is_its_frames_measured(folders, files):
    processing = VLM2Vec.from_pretrained(folders("llava_next"), device="cpu").processing
    measured = assert_equal(processing, {"text": "<|video_1|> or <|image_1|>?", "video": [files[0], files[1]], "image": files[4]})
    assert measured.pending == [[files[0]], [files[1]], [files[4]]] and len(measured.vision["tiles"]) == 3


@pytest.mark.parametrize("options", [{"resolution": "high"}, {"resolution": (30, 60)}, {"resolution": "native"}, {}], ids=str)
def test_llavas_plain_resizes(folders, tmp_path, options):
    processing = VLM2Vec.from_pretrained(folders("llava_next"), device="cpu", **options).processing
    for size in ((1500, 40), (1344, 20), (20, 30)):
        picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        picture.save(tmp_path / f"{size[0]}.png")
        assert assert_equal(processing, {"text": "what", "image": tmp_path / f"{size[0]}.png"}).pending


def test_llava_is_processed_at_once_where_headers_do_not_tell(folders, files, monkeypatch):
    torchvision = VLM2Vec.from_pretrained(folders("llava_next"), device="cpu", pixels="torchvision").processing
    assert not torchvision.from_headers and not assert_equal(torchvision, {"image": files[1]}).pending
    processing = VLM2Vec.from_pretrained(folders("llava_next"), device="cpu").processing
    monkeypatch.setattr(processing.image_processor, "image_grid_pinpoints", [[28, 28]])  # not those of config.json
    assert not processing.from_headers and not assert_equal(processing, {"image": files[1]}).pending


def test_phis_crops(folders, files):
    for num_crops in (1, 4, 16):
        processing = VLM2Vec.from_pretrained(folders("phi3_v"), device="cpu", num_crops=num_crops).processing
        for file in files:
            assert assert_equal(processing, {"text": "what", "image": file}).pending
