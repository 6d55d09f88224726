"""The HD transform of Phi-3.5-V against the reference's pixels and tables, and against the rules as documented."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.golden_files import read
from tests.helpers.phi3_v_crops import image_crops
from vlm2vec.backbones.phi3_v.images import CLIP_MEAN, CLIP_STD, hd_transform, image_tiles, image_tokens, normalised_views, padded_size


@pytest.fixture(scope="module")
def phi(golden):
    return read(golden, "phi3_v")


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_size_and_token_table_of_the_reference(phi):
    rows = phi[1]["hd_table"]["rows"]
    assert len(rows) > 50
    for width, height, num_crops, padded, tokens, processor_size, processor_tokens in rows:
        size = padded_size(width, height, num_crops)
        assert list(size) == padded, (width, height, num_crops)
        assert image_tokens(*size) == tokens, (width, height, num_crops)
        if processor_size is not None:  # rows for which the reference ran its whole processor
            assert [size[1], size[0]] == processor_size
            assert image_tokens(*size) == processor_tokens


def test_pixels_of_the_reference(phi):
    folder, cases, expected = phi
    checked = 0
    for name, batch in cases["batches"].items():
        item = batch["items"][0]
        if not name.startswith("single.") or item["image"] is None:
            continue
        crops, size = image_crops(Image.open(folder / item["image"]), cases["num_crops"])
        assert [list(size)] == item["image_size_height_width"]
        assert image_tokens(size[1], size[0]) == item["n_image_tokens"]
        sample = expected[f"{name}.pixel_values_sample"]
        torch.testing.assert_close(crops[:, :, ::12, ::12], sample[: len(crops)], atol=1e-6, rtol=0)
        assert not sample[len(crops) :].any()  # what is left out here is zero there
        total = item["pixel_values_sum"]
        assert crops.double().sum().item() == pytest.approx(total, rel=1e-6)
        checked += 1
    assert checked >= 4


# Square, landscape, portrait, a strip each way, a size of exactly the crop, one pixel.
SIZES = [(336, 336), (640, 480), (480, 640), (2000, 100), (100, 2000), (337, 335), (1, 1)]


@pytest.mark.parametrize("num_crops", [1, 2, 4, 7, 16])  # 2 and 7: no full rectangle of crops
@pytest.mark.parametrize("size", SIZES)
def test_size_rule_by_exhaustion(size, num_crops):
    """The largest k with k * ceil(k / ratio) <= num_crops, found by trying every k instead of counting up."""
    long, short = max(size), min(size)
    ratio = long / short
    k = max(k for k in range(1, num_crops + 1) if k * math.ceil(k / ratio) <= num_crops)
    down = math.ceil(max(1, int(k * 336 / ratio)) / 336)
    expected = (336 * k, 336 * down) if size[0] >= size[1] else (336 * down, 336 * k)
    assert padded_size(*size, num_crops) == expected
    assert (expected[0] // 336) * (expected[1] // 336) <= num_crops


def test_landscape_is_scaled_then_padded_above_and_below_with_white():
    image = noise(50, 20)
    padded = np.array(hd_transform(image, 4))
    assert padded.shape == (336, 672, 3)
    height = int(672 / 2.5)  # 268: 34 white rows above, 34 below
    scaled = np.array(image.resize((672, height), Image.Resampling.BILINEAR))
    assert (padded[:34] == 255).all() and (padded[34 + height :] == 255).all()
    np.testing.assert_array_equal(padded[34 : 34 + height], scaled)


def test_odd_padding_puts_the_larger_half_below():
    image = noise(400, 190)  # 319 rows after scaling
    padded = np.array(hd_transform(image, 4))
    height = int(672 / (400 / 190))
    above = (336 - height) // 2
    assert (336 - height) % 2 == 1
    assert (padded[:above] == 255).all() and not (padded[above] == 255).all()
    assert (padded[above + height :] == 255).all() and not (padded[above + height - 1] == 255).all()


def test_portrait_is_the_transposed_landscape():
    image = noise(30, 90)
    upright = np.array(hd_transform(image, 16))
    lying = np.array(hd_transform(image.transpose(Image.Transpose.TRANSPOSE), 16))
    np.testing.assert_array_equal(upright, lying.transpose(1, 0, 2))


def test_crops_are_the_global_view_then_raster_order():
    image = noise(90, 60)
    crops, (height, width) = image_crops(image, 16)
    padded = torch.from_numpy(np.array(hd_transform(image, 16))).permute(2, 0, 1).float() / 255
    pixels = (padded - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    assert pixels.shape == (3, height, width)
    assert crops.shape == (1 + height * width // 336**2, 3, 336, 336)
    whole = torch.nn.functional.interpolate(pixels[None], size=(336, 336), mode="bicubic")[0]
    torch.testing.assert_close(crops[0], whole, atol=1e-6, rtol=0)
    at = 1
    for y in range(0, height, 336):
        for x in range(0, width, 336):
            torch.testing.assert_close(crops[at], pixels[:, y : y + 336, x : x + 336], atol=1e-6, rtol=0)
            at += 1


def cut_from_floats(image, num_crops, crop, mean=CLIP_MEAN, std=CLIP_STD):
    """The reference's order: the whole picture normalised in float32, its global view resized from it, then cut."""
    pixels = torch.from_numpy(np.array(hd_transform(image, num_crops, crop))).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    pixels.sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))
    whole = torch.nn.functional.interpolate(pixels[None], size=(crop, crop), mode="bicubic", align_corners=False)
    _, height, width = pixels.shape
    tiles = pixels.view(3, height // crop, crop, width // crop, crop).permute(1, 3, 0, 2, 4).reshape(-1, 3, crop, crop)
    return torch.cat([whole, tiles])


@pytest.mark.parametrize("num_crops", [1, 4, 16])
def test_views_made_of_bytes_are_those_of_floats_to_the_bit(num_crops):
    """Bytes are cut first and normalised later, for several pictures at once."""
    for crop, mean, std in ((336, CLIP_MEAN, CLIP_STD), (28, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))):
        images = [noise(*size) for size in [*SIZES, (50, 20), (400, 190)]]
        tiles = [image_tiles(image, num_crops, crop) for image in images]
        sizes = [padded_size(*image.size, num_crops, crop) for image in images]
        together = normalised_views(torch.cat(tiles), [(h // crop, w // crop) for w, h in sizes], mean, std)
        expected = torch.cat([cut_from_floats(image, num_crops, crop, mean, std) for image in images])
        assert torch.equal(together, expected) and all(t.dtype == torch.uint8 for t in tiles)


def test_other_crop_sizes_follow_the_same_rules():
    crops, (height, width) = image_crops(noise(90, 60), 4, crop=28)
    assert (height, width) == (56, 56) and crops.shape == (5, 3, 28, 28)
    assert image_tokens(width, height, crop=28, grid=1) == 5 + 1 + 3


def test_one_pixel_lines_do_not_vanish():
    # 16 * 336 / 20,000 is below one pixel, which the reference's resize refuses; one row is kept here
    crops, size = image_crops(noise(20_000, 1), 16)
    assert size == (336, 5376) and torch.isfinite(crops).all()


@pytest.mark.parametrize("num_crops", [0, -1, 2.5])
def test_crop_counts_that_mean_nothing_are_refused(num_crops):
    with pytest.raises(ValueError, match="num_crops"):
        padded_size(10, 10, num_crops)


def test_empty_pictures_are_refused():
    with pytest.raises(ValueError, match="0 x 10"):
        padded_size(0, 10, 4)
