"""Pictures as files and people bring them: every mode, animations, damage, size."""

import io

import numpy as np
import pytest
from PIL import Image

from vlm2vec.media.images import REFERENCE, measure_picture, open_picture


def picture(width=60, height=40, seed=0, mode="RGB"):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I"])
def test_every_mode_becomes_rgb(mode):
    if mode in ("I;16", "I"):
        values = np.linspace(0, 65535, 60 * 40).reshape(40, 60)
        image = Image.fromarray(values.astype("uint16" if mode == "I;16" else "int32"))
    else:
        image = picture(mode=mode)
    opened = open_picture(image)
    assert opened.mode == "RGB" and opened.size == (60, 40)
    if mode in ("I;16", "I"):
        grey = np.asarray(opened)[..., 0]
        assert grey.min() == 0 and grey.max() == 255 and 100 < np.median(grey) < 155  # scaled, not clipped to white


def test_animated_files_give_their_first_frame(tmp_path):
    frames = [picture(seed=i) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    first = np.asarray(open_picture(tmp_path / "a.gif")).astype(int)
    assert np.abs(first - np.asarray(frames[0].quantize().convert("RGB")).astype(int)).mean() < 20


def test_bad_images_are_named(tmp_path):
    picture(200, 200).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, said in (
        ("nothing.png", "no such file"),
        ("cut.png", "truncated"),
        ("text.png", "not an image"),
        ("empty.png", "not an image"),
    ):
        with pytest.raises(ValueError, match=said) as e:
            open_picture(tmp_path / name)
        assert name in str(e.value)
    with pytest.raises(ValueError, match="limit of 100 pixels"):
        open_picture(tmp_path / "whole.png", max_pixels=100)
    with pytest.raises(ValueError, match="0 x 5"):
        open_picture(Image.new("RGB", (0, 5)))
    with pytest.raises(ValueError, match="float pixels"):
        open_picture(Image.new("F", (4, 4)))
    with pytest.raises(ValueError, match="not an image"):
        open_picture(b"junk")


def test_a_decompression_bomb_is_refused():
    header = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(header, "PNG")
    with pytest.raises(ValueError, match="pixels"):
        open_picture(header.getvalue())


def test_pictures_are_read_as_they_are_stored(tmp_path):
    """As the reference reads them, where its scores are wanted: no camera's turn, and what lies under transparent pixels shows."""
    camera = picture(60, 40)
    exif = camera.getexif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    camera.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "turned.png", **REFERENCE)), np.asarray(camera))
    assert measure_picture(tmp_path / "turned.png", orientation="stored").size == (60, 40), "the header is read by the same rule"
    hidden = camera.copy()
    hidden.putalpha(0)
    np.testing.assert_array_equal(np.asarray(open_picture(hidden, **REFERENCE)), np.asarray(camera))


def test_a_header_says_what_the_picture_turns_out_to_be(tmp_path):
    for mode, name in (("RGB", "a.jpg"), ("P", "b.gif"), ("LA", "c.png"), ("CMYK", "d.tif"), ("1", "e.bmp"), ("RGBA", "f.webp")):
        picture(61, 37, mode=mode).save(tmp_path / name)
        assert measure_picture(tmp_path / name).size == open_picture(tmp_path / name).size == (61, 37), name
    (tmp_path / "bomb.png").write_bytes((tmp_path / "c.png").read_bytes())
    with pytest.raises(ValueError, match="limit of 100 pixels"):
        measure_picture(tmp_path / "bomb.png", max_pixels=100)
