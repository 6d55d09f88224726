"""What notebooks hold: arrays, tensors, open files, undecoded rows, data: URIs, base64 and URLs; and strings that name pictures."""

import base64
import http.server
import io
import re
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_models import qwen2_vl
from vlm2vec.media import open_picture
from vlm2vec.media import sources as media_sources
from vlm2vec.model import VLM2Vec

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def file_bytes(kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind)
    return buffer.getvalue()


DATA = file_bytes()
BASE64 = base64.b64encode(DATA).decode()
URI = f"data:image/png;base64,{BASE64}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    qwen2_vl(folder)
    return VLM2Vec.from_pretrained(folder)


@pytest.fixture(scope="module")
def server():
    """A page with one picture."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/fox.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(DATA if found else b"no")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{page.server_port}"
        page.shutdown()


CHANNELS_FIRST = np.ascontiguousarray(PIXELS.transpose(2, 0, 1))
FORMS = {
    "bytes": DATA,
    "bytearray": bytearray(DATA),
    "memoryview": memoryview(DATA),
    "BytesIO": io.BytesIO(DATA),
    "array": PIXELS,
    "array of another order": np.asfortranarray(PIXELS),
    "read-only view": np.broadcast_to(PIXELS, PIXELS.shape),
    "array, channels first": CHANNELS_FIRST,
    "array of int64": PIXELS.astype(np.int64),
    "array of uint16": PIXELS.astype(np.uint16) * 257,
    "array of float32": PIXELS.astype(np.float32) / 255,
    "array of float64": PIXELS / 255,
    "tensor": torch.from_numpy(CHANNELS_FIRST),
    "tensor, channels last": torch.from_numpy(PIXELS),
    "tensor of float32": torch.from_numpy(CHANNELS_FIRST) / 255,
    "tensor with a gradient": (torch.from_numpy(CHANNELS_FIRST) / 255).requires_grad_(),
    "undecoded row": {"bytes": DATA, "path": "gone.png"},
    "undecoded row without a path": {"bytes": DATA, "path": None},
    "data URI": URI,
    "data URI with other letters": URI.replace("data:image/png", "DATA:Image/PNG"),
    "base64": {"base64": BASE64},
    "base64 in lines": {"base64": "\n".join(BASE64[i : i + 76] for i in range(0, len(BASE64), 76))},
    "data URI under base64": {"base64": URI},
    "url": {"url": URI},
}


@pytest.mark.parametrize("form", FORMS)
def test_one_picture_in_many_forms(form):
    np.testing.assert_array_equal(np.asarray(open_picture(FORMS[form])), PIXELS)


def test_files_and_rows_by_path(tmp_path):
    (tmp_path / "a b.png").write_bytes(DATA)
    with open(tmp_path / "a b.png", "rb") as file:
        file.read(3)  # somebody has looked into it already
        for source in (file, tmp_path / "a b.png", {"bytes": None, "path": str(tmp_path / "a b.png")}, (tmp_path / "a b.png").as_uri()):
            np.testing.assert_array_equal(np.asarray(open_picture(source)), PIXELS)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (np.full((4, 4), 9, np.uint8), 9),
        (np.full((4, 4, 1), 9, np.uint8), 9),
        (torch.full((1, 4, 4), 9, dtype=torch.uint8), 9),
        (np.full((4, 4), True), 255),
        (np.zeros((4, 4, 4), np.uint8), 255),  # transparent, on white
        (torch.full((3, 4, 3), 0.2, dtype=torch.bfloat16), 51),
        (np.full((4, 4), 0.5, np.float16), 128),
        (np.full((4, 4), 200, np.uint16), 1),
    ],
)
def test_greys_masks_and_alpha(source, shown):
    assert (np.asarray(open_picture(source)) == shown).all()


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"image": x}, lambda x: {"text": "<|image_1|>", "images": [x]}])
@pytest.mark.parametrize("form", ["array", "tensor", "BytesIO", "undecoded row", "data URI", "base64"])
def test_encode_takes_them(model, form, wrap):
    row = model.encode(wrap(FORMS[form]))
    assert row.shape == (model.embedding_dim,), "one picture, not a list"
    np.testing.assert_array_equal(row, model.encode(DATA))


def test_lists_batches_and_films_of_arrays(model):
    one = model.encode(DATA)
    for batch in ([PIXELS, PIXELS], np.stack([PIXELS] * 2), torch.from_numpy(np.stack([CHANNELS_FIRST] * 2)), (DATA, URI)):
        rows = model.encode(batch)
        assert rows.shape == (2, model.embedding_dim)
        np.testing.assert_allclose(rows, np.stack([one] * 2), atol=1e-6)
    assert model.encode(np.array(["a fox", "an owl"])).shape == (2, model.embedding_dim)
    film = np.stack([PIXELS] * 4)
    np.testing.assert_array_equal(model.encode({"video": film}), model.encode({"video": [Image.fromarray(frame) for frame in film]}))
    np.testing.assert_array_equal(model.encode({"images": film[:2]}), model.encode({"images": [DATA, DATA]}))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": PIXELS},
        {"type": "image", "url": URI},
        {"type": "image", "base64": BASE64},
        {"type": "image_url", "image_url": {"url": URI}},
        {"type": "image_url", "image_url": URI},
    ],
)
def test_chat_parts_of_other_libraries(model, part):
    np.testing.assert_array_equal(model.encode([{"role": "user", "content": [part]}]), model.encode(DATA))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (np.zeros((5, 6, 7), np.uint8), "ndarray (5, 6, 7): expected 1, 3 or 4 channels first or last"),
        (np.zeros((1, 2, 4, 4, 3), np.uint8), "expected (H, W), (H, W, C) or (C, H, W)"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (np.full((4, 4, 3), 300), "int64 values are expected from 0 to 255, got 300 to 300"),
        (np.full((4, 4, 3), -1), "expected from 0 to 255, got -1"),
        (np.full((4, 4, 3), 200.0), "floats are expected from 0 to 1, got 200 to 200; divide by 255"),
        (np.full((4, 4, 3), np.nan), "floats are expected from 0 to 1, got nan"),
        (torch.full((3, 4, 4), float("inf")), "floats are expected from 0 to 1, got inf"),
        (np.zeros((4, 4), "complex64"), "complex64 values are no pixels"),
        (io.StringIO("text"), "opened as text; open it with mode 'rb'"),
        (io.BytesIO(b""), "not an image file"),
        ({"bytes": None, "path": None}, "a picture of 'bytes', 'path' without a value"),
        ({"base64": "%%%"}, "not base64"),
        ({"base64": 7}, "'base64' must be a str"),
        ("data:image/png;base64,!!", "not base64"),
        (BASE64, 'too long for a path; base64 goes as {"base64": "..."}'),
        ("https://example.com/fox.png", "URLs are read only where it is allowed; say encode(..., urls=True)"),
        ({"url": "http://example.com/fox.png"}, "URLs are read only where it is allowed"),
        ("a\0b.png", "a path holds no null character"),
        (7, "expected a path, bytes, a PIL image, an array, an open file or a dict"),
    ],
)
def test_what_is_no_picture_is_named(model, source, said):
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        model.encode([{"image": source}])
    assert str(caught.value).startswith("input 0: ") and len(str(caught.value)) < 500


def test_urls_are_read_where_it_is_allowed(model, server, monkeypatch):
    for source in (
        {"image": f"{server}/fox.png"},
        {"url": f"{server}/fox.png"},
        {"text": "<|image_1|>", "image": {"url": f"{server}/fox.png"}},
    ):
        np.testing.assert_array_equal(model.encode(source, urls=True), model.encode(DATA))
    with pytest.raises(ValueError, match="input 1: image http.*/none.png: cannot be fetched .*404"):
        model.encode(["a fox", {"image": f"{server}/none.png"}], urls=True)
    monkeypatch.setattr(media_sources, "MAX_DOWNLOAD", 10)
    with pytest.raises(ValueError, match="more than .*download it"):
        model.encode({"image": f"{server}/fox.png"}, urls=True)


def test_a_url_alone_is_text(model):
    assert np.isfinite(model.encode("https://example.com/fox.png")).all()


# -- strings that name pictures ----------------------------------------------------------------------------------------


def test_a_string_that_names_a_picture_is_text_with_a_hint(model, tmp_path):
    (tmp_path / "fox.png").write_bytes(DATA)
    name = str(tmp_path / "fox.png")
    with pytest.warns(UserWarning, match="1 of 2 inputs are strings, fed as text, though such files exist.*fox.png.*pathlib"):
        rows = model.encode([name, "a fox"])
    np.testing.assert_allclose(rows[0], model.encode({"text": name}), atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(["gone.png", "a fox", {"image": name}, {"text": name}])


def test_sentence_transformers_reads_it_as_a_picture(model, tmp_path, server):
    pytest.importorskip("sentence_transformers")
    (tmp_path / "fox.png").write_bytes(DATA)
    name = str(tmp_path / "fox.png")
    wrapped = model.to_sentence_transformer()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rows = wrapped.encode([name, "a fox", "gone.png"])
    np.testing.assert_allclose(rows, model.encode([DATA, "a fox", "gone.png"]), atol=1e-6)
    with pytest.raises(ValueError, match=r"fox.png is a picture's URL; set model\[0\].urls = True"):
        wrapped.encode([f"{server}/fox.png"])
    wrapped[0].urls = True
    np.testing.assert_allclose(wrapped.encode([f"{server}/fox.png"])[0], rows[0], atol=1e-6)
