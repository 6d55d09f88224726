"""Pictures as cameras, drawing programs and scanners write them: orientation, transparency, modes and bit depths."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from tests.helpers.tiny_models import qwen2_vl
from vlm2vec.data.mmeb import write_eval
from vlm2vec.evaluation.runner import Options, run_tasks
from vlm2vec.evaluation.tasks import find_tasks
from vlm2vec.media import measure_picture, open_picture
from vlm2vec.media.images import REFERENCE
from vlm2vec.model import VLM2Vec

ORIENTATION = 0x0112


def colours(width=60, height=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def from_camera(kind, orientation, image=None):
    image = image or colours()
    exif = image.getexif()
    exif[ORIENTATION] = orientation
    return encoded(image, kind, exif=exif)


def pixels(source, **reading):
    return np.asarray(open_picture(source, **reading))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "model"
    folder.mkdir()
    qwen2_vl(folder)
    return folder


# -- orientation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_camera_is_believed(kind, orientation):
    data = from_camera(kind, orientation)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(pixels(data), np.asarray(shown))
    assert measure_picture(data).size == shown.size, "the header says what the picture turns out to be"
    opened = Image.open(io.BytesIO(data))
    np.testing.assert_array_equal(pixels(opened), np.asarray(shown), err_msg="an opened picture and its file are the same picture")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_stored_leaves_pixels_as_they_lie(kind):
    data = from_camera(kind, 6)
    np.testing.assert_array_equal(pixels(data, orientation="stored"), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert measure_picture(data, orientation="stored").size == (60, 40)


def test_exif_behind_the_pixels_of_a_png_is_seen_by_the_header_too():
    data = from_camera("PNG", 6)
    at = data.index(b"eXIf") - 4
    (length,) = struct.unpack(">I", data[at : at + 4])
    chunk, end = data[at : at + length + 12], data.index(b"IEND") - 4
    late = data[:at] + data[at + len(chunk) : end] + chunk + data[end:]
    np.testing.assert_array_equal(pixels(late), pixels(data))
    assert measure_picture(late).size == (40, 60)


@pytest.mark.parametrize("value", [0, 9, "up", b"\1"])
def test_an_orientation_that_means_nothing_turns_nothing(value):
    image = colours()
    image.getexif()[ORIENTATION] = value
    np.testing.assert_array_equal(pixels(image), np.asarray(colours()))


def test_damaged_exif_does_not_cost_the_picture():
    image = colours()
    image.info["exif"] = b"Exif\0\0II*\0junk"
    image._exif = None
    np.testing.assert_array_equal(pixels(image), np.asarray(colours()))


def test_a_path_and_a_row_of_datasets_have_one_embedding(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "camera.jpg").write_bytes(from_camera("JPEG", 6))
    table = datasets.Dataset.from_dict({"image": [str(tmp_path / "camera.jpg")]}).cast_column("image", datasets.Image())
    undecoded = table.cast_column("image", datasets.Image(decode=False))
    model = VLM2Vec.from_pretrained(folder)
    rows = model.encode([tmp_path / "camera.jpg", table[0]["image"], {"image": undecoded[0]["image"]}])
    np.testing.assert_allclose(rows, rows[:1].repeat(3, axis=0), atol=1e-6)


# -- transparency ------------------------------------------------------------------------------------------------------


def with_alpha(mode, alpha):
    """A picture of colour (200, 100, 50), or of grey 100, under one alpha."""
    if mode in ("RGBA", "RGBa"):
        return Image.new("RGBA", (4, 4), (200, 100, 50, alpha)).convert(mode)
    return Image.new("LA", (4, 4), (100, alpha)).convert(mode)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (with_alpha("RGBA", 0), (255, 255, 255)),
        (with_alpha("RGBA", 255), (200, 100, 50)),
        (with_alpha("RGBA", 51), (244, 224, 214)),  # a fifth of the colour, four fifths of white
        (with_alpha("LA", 0), (255, 255, 255)),
        (with_alpha("LA", 51), (224, 224, 224)),
        (with_alpha("RGBa", 0), (255, 255, 255)),
        (with_alpha("La", 0), (255, 255, 255)),
        (encoded(with_alpha("RGBA", 0), "PNG"), (255, 255, 255)),
        (encoded(with_alpha("RGBA", 0), "WEBP", lossless=True, exact=True), (255, 255, 255)),
        (encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3)), (255, 255, 255)),
        (encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(9, 9, 9)), (1, 2, 3)),
        (encoded(Image.new("L", (4, 4), 7), "PNG", transparency=7), (255, 255, 255)),
        (encoded(Image.new("1", (4, 4), 0), "PNG", transparency=0), (255, 255, 255)),
        (encoded(Image.new("P", (4, 4), 0), "PNG", transparency=0), (255, 255, 255)),
        (encoded(Image.new("P", (4, 4), 0), "GIF", transparency=0), (255, 255, 255)),
        (encoded(Image.fromarray(np.full((4, 4), 5, "uint16")), "PNG", transparency=5), (255, 255, 255)),
    ],
)
def test_transparent_pixels_lie_on_white(source, shown):
    assert (pixels(source) == shown).all()


@pytest.mark.parametrize("alpha", [0, 51, 255])
def test_hidden_shows_what_is_stored_under_them(alpha):
    assert (pixels(with_alpha("RGBA", alpha), background="hidden") == (200, 100, 50)).all()


# -- modes and bit depths ----------------------------------------------------------------------------------------------


def grey(value, kind):
    return Image.fromarray(np.full((4, 4), value, kind))


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (grey(0, "uint16"), 0),
        (grey(200, "uint16"), 1),  # a dark picture stays dark, whatever its own maximum is
        (grey(255, "uint16"), 1),
        (grey(25700, "uint16"), 100),
        (grey(65535, "uint16"), 255),
        (grey(200, "int32"), 1),
        (grey(65535, "int32"), 255),
        (encoded(grey(200, "uint16"), "PNG"), 1),
        (encoded(grey(200, "uint16"), "TIFF"), 1),
        (encoded(grey(25700, "uint16"), "TIFF"), 100),
        (encoded(grey(25700, "uint16"), "PPM"), 100),
        (Image.new("1", (4, 4), 1), 255),
        (Image.new("L", (4, 4), 9), 9),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), 255),
        (Image.new("YCbCr", (4, 4), (9, 128, 128)), 9),
        (Image.new("HSV", (4, 4), (0, 0, 9)), 9),
        (Image.new("LAB", (4, 4), (255, 128, 128)), 255),
        (Image.new("RGBX", (4, 4), (9, 9, 9, 0)), 9),
        (Image.new("PA", (4, 4)), 0),
    ],
)
def test_every_depth_keeps_its_meaning(source, shown):
    made = pixels(source, background="hidden").astype(int)
    assert made.shape == (4, 4, 3) and abs(made - shown).max() <= (1 if getattr(source, "mode", "") == "LAB" else 0)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (grey(65536, "int32"), "32-bit values from 65536 to 65536"),
        (grey(-1, "int32"), "32-bit values from -1 to -1"),
        (Image.new("F", (4, 4)), "float pixels have no known range"),
    ],
)
def test_values_of_unknown_range_are_refused(source, said):
    with pytest.raises(ValueError, match=said):
        open_picture(source)


@pytest.mark.parametrize("error", [struct.error("unpack"), EOFError(), IndexError("list"), zlib.error("-3"), MemoryError(), KeyError("x")])
@pytest.mark.parametrize("step", ["open", "load"])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error, step):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(*((Image, "open") if step == "open" else (ImageFile.ImageFile, "load")), broken)
    (tmp_path / "odd.jpg").write_bytes(from_camera("JPEG", 6))
    with pytest.raises(ValueError, match="odd.jpg") as caught:
        open_picture(tmp_path / "odd.jpg")
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(("name", "value"), [("orientation", "up"), ("background", "black"), ("orientation", None)])
def test_an_unknown_reading_is_refused(folder, name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected '"):
        VLM2Vec.from_pretrained(folder, **{name: value})
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected '"):
        open_picture(colours(), **{name: value})


# -- who reads how -----------------------------------------------------------------------------------------------------


def test_saved_folders_say_how_pictures_are_read(folder, tmp_path):
    model = VLM2Vec.from_pretrained(folder)
    model.save_pretrained(tmp_path / "users")
    model.reading(**REFERENCE).save_pretrained(tmp_path / "reference")
    for name, wanted in (("users", {"orientation": "exif", "background": "white"}), ("reference", REFERENCE)):
        options = json.loads((tmp_path / name / "vlm2vec.json").read_text())["options"]
        assert {key: options[key] for key in wanted} == wanted
        again = VLM2Vec.from_pretrained(tmp_path / name).options
        assert {key: again[key] for key in wanted} == wanted
    assert model.options["orientation"] == "exif", "a view leaves the model alone"


def test_published_tasks_are_read_as_the_reference_reads_them_and_own_tasks_as_people_see_them(folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    camera = colours(84, 56)
    (images / "camera.jpg").write_bytes(from_camera("JPEG", 6, camera))
    stored = Image.open(images / "camera.jpg").convert("RGB")
    stored.getexif().clear()
    stored.info.clear()
    stored.save(images / "stored.png")
    stored.rotate(-90, expand=True).save(images / "upright.png")
    row = {"qry_text": "<|image_1|>", "qry_img_path": "camera.jpg", "tgt_text": ["<|image_1|>"] * 2}
    row["tgt_img_path"] = ["upright.png", "stored.png"]
    for name in ("NIGHTS", "Shop"):
        write_eval(tmp_path / "data", name, [row])
    model = VLM2Vec.from_pretrained(folder)

    def scores(**asked):
        tasks = find_tasks(tmp_path / "data", None, {})
        options = Options(progress=False, pictures=asked)
        rows = run_tasks(model, tasks, tmp_path / "data", images, tmp_path / f"scores{len(asked)}", options=options)
        assert [row["task"] for row in rows] == [task.name for task in tasks]
        return {row["task"]: row["score"] for row in rows}

    assert scores() == {"NIGHTS": 0.0, "Shop": 1.0}
    assert scores(orientation="exif") == {"NIGHTS": 1.0, "Shop": 1.0}
