"""Ids of own data's contents: of the bytes of pictures and films, however the table holds them."""

import base64
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers.film_files import shade, write_film
from train.data import contents
from train.data.contents import content_id, film_digest


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("contents")
    generator = np.random.default_rng(0)
    for folder in ("frames", "others"):
        (root / folder).mkdir()
        for number in range(12):
            Image.fromarray(generator.integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(root / folder / f"{number}.png")
    shutil.copytree(root / "frames", root / "copied")
    write_film(root / "clip.mp4", [shade(n, (32, 32)) for n in range(4)])
    shutil.copy(root / "clip.mp4", root / "again.mp4")
    return root


def of(**item):
    return content_id({"text": "", "image": None} | item, by_bytes=True)


def test_a_picture_is_its_bytes_in_every_form(place):
    path = place / "frames" / "0.png"
    body = path.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(body).decode()
    assert len({of(image=form) for form in (path, str(path), body, uri, str(place / "copied" / "0.png"))}) == 1
    several = [
        of(image=[path, body]),
        of(image=[body, uri]),
        of(image=path),
        of(image=str(place / "others" / "0.png")),
        of(text="x", image=path),
    ]
    assert several[0] == several[1] and len(set(several)) == 4


def test_a_film_is_its_file_or_its_frames(place, monkeypatch):
    monkeypatch.setattr(contents, "_EDGE", 100)
    clip = place / "clip.mp4"
    assert len({of(video=form) for form in (str(clip), clip.read_bytes(), str(place / "again.mp4"))}) == 1
    changed = bytearray(clip.read_bytes())
    changed[-1] ^= 1
    assert film_digest(bytes(changed)) != film_digest(str(clip))
    frames = [str(place / "frames" / f"{number}.png") for number in range(12)]
    assert of(video=frames) == of(video=str(place / "frames")) == of(video=str(place / "copied"))
    assert len({of(video=frames), of(video=frames[::-1]), of(video=frames[:-1]), of(video=str(place / "others")), of(image=frames)}) == 5
    films = [str(clip), str(place / "again.mp4")]
    assert of(video=films) != of(video=films[0]) and of(video=films) == of(video=[clip.read_bytes()] * 2)


@pytest.mark.parametrize("size", [0, 99, 100, 101, 199, 200, 201, 500])
def test_a_film_is_the_same_from_bytes_and_file(tmp_path, monkeypatch, size):
    """Sizes around one and two of the ends that are read."""
    monkeypatch.setattr(contents, "_EDGE", 100)
    body = np.random.default_rng(size).bytes(size)
    (tmp_path / f"{size}.mp4").write_bytes(body)
    assert film_digest(body) == film_digest(str(tmp_path / f"{size}.mp4"))


def test_a_file_that_was_changed_is_another_and_one_that_was_not_is_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    before = of(image=str(path))
    with monkeypatch.context() as patched:
        patched.setattr(contents, "open", None, raising=False)
        assert of(image=str(path)) == before
    path.write_bytes(b"three")
    assert of(image=str(path)) != before


def test_texts_are_the_same_in_own_data_and_published_formats():
    for item in ({"text": "a fox", "image": None}, {"text": "a fox", "instruction": "Find."}, {"text": ""}):
        assert content_id(item, by_bytes=True) == content_id(item)
