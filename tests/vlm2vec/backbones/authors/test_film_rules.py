"""Frames, times and sizes of films by the rules of Qwen's own tools: values worked out by hand, or by torchvision on the whole."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.film_files import shade, write_film
from vlm2vec.backbones.authors import resizing
from vlm2vec.backbones.authors.films import Film, evenly, frame_count, listed, read_film, stamps
from vlm2vec.media.films import Frames


@pytest.mark.parametrize(
    ("total", "rate", "asked", "indices"),
    [
        (60, 10.0, {"fps": 1}, [0, 12, 24, 35, 47, 59]),
        (60, 10.0, {"fps": 1, "max_frames": 5}, [0, 20, 39, 59]),  # an odd bound gives an even number below it
        (60, 10.0, {"fps": 0.1}, [0, 20, 39, 59]),  # never fewer than four
        (60, 10.0, {"fps": 0.1, "min_frames": 2}, [0, 59]),
        (5, 10.0, {"fps": 1}, [0, 1, 3, 4]),
        (3, 10.0, {"fps": 1}, [0, 2]),  # nor more than there are
        (60, 10.0, {"nframes": 5}, [0, 20, 39, 59]),  # Python rounds 2.5 to 2
        (60, 10.0, {"nframes": 2, "fps": 1}, [0, 59]),
        (60, 10.0, {"fps": None, "frames": 8}, [0, 8, 17, 25, 34, 42, 51, 59]),
        (3, 10.0, {"fps": None, "frames": 8}, [0, 2]),
        (2, 10.0, {"fps": 30}, [0, 1]),
        (6, 1.0, {"fps": 1, "min_frames": 4, "max_frames": 4}, [0, 2, 3, 5]),  # 1.67 and 3.33
    ],
)
def test_which_frames(total, rate, asked, indices):
    assert evenly(total, frame_count(total, rate, asked)) == indices


def test_ties_go_to_the_even_frame():
    assert evenly(4, 3) == [0, 2, 3] and evenly(6, 3) == [0, 2, 5]  # 1.5 and 2.5


@pytest.mark.parametrize(("asked", "said"), [({"nframes": 1}, "expected 2 to 60 frames, got 0"), ({"nframes": 99}, "got 100")])
def test_frames_that_a_film_has_not(asked, said):
    with pytest.raises(ValueError, match=said):
        frame_count(60, 10.0, asked)


def test_an_odd_frame_is_counted_twice():
    assert stamps(listed(list("abc"), None, {})) == ["<0.2 seconds>", "<1.2 seconds>"]
    assert listed(list("abc"), None, {}) == list("abcc") and stamps(listed(["a"], None, {})) == ["<0.2 seconds>"]
    assert stamps(listed(list("abcd"), None, {"sample_fps": 0.5})) == ["<1.0 seconds>", "<5.0 seconds>"]
    assert stamps(listed(Frames("abc", [3.0, 4.0, 9.0]), None, {})) == ["<3.5 seconds>", "<9.0 seconds>"], "times that a list has stay"
    assert len(listed(list(range(70)), 64, {})) == 64 and listed(list(range(70)), 64, {})[1:3] == [1, 2]


def test_a_film_of_one_frame_is_refused(tmp_path):
    pytest.importorskip("av")
    film = write_film(tmp_path / "one.mp4", [shade(1)], rate=10)
    asked = {"fps": 1.0, "frames": 8, "max_frames": 64, "most_listed": 64}
    with pytest.raises(ValueError, match=r"one\.mp4: expected at least 2 frames, got 1; give it as an image"):
        read_film(str(film), settings={}, **asked)
    with pytest.raises(ValueError, match="expected fps or nframes of one film, got both"):
        read_film(str(film), settings={"fps": 1, "nframes": 4}, **asked)
    with pytest.raises(ValueError, match="a video needs at least one frame"):
        read_film([], settings={}, **asked)


def test_times_are_of_the_frames_that_are_shown(tmp_path):
    pytest.importorskip("av")
    film = write_film(tmp_path / "six.mp4", [shade(i) for i in range(60)], rate=10)
    found = read_film(film, fps=1.0, frames=8, max_frames=64, most_listed=64, settings={"fps": 2, "max_frames": 8})
    assert found.seconds == [0.0, 0.8, 1.7, 2.5, 3.4, 4.2, 5.1, 5.9] and not found.listed
    assert stamps(found) == ["<0.4 seconds>", "<2.1 seconds>", "<3.8 seconds>", "<5.5 seconds>"]


@pytest.mark.parametrize(
    ("size", "count", "limits", "expected"),
    [
        # width, height of the frame as it comes out; a small frame grows to 128 tokens, a large one shrinks to 768
        ((192, 128), 6, {}, (448, 320)),
        ((1280, 720), 6, {}, (1152, 640)),
        ((1280, 704), 64, {"total_pixels": 7_864_320}, (640, 352)),  # 2 / 64 of the total
        ((1280, 704), 64, {"total_pixels": 1}, (480, 256)),  # not below 1.05 times the least
        ((192, 128), 6, {"min_pixels": 4096, "max_pixels": 16384}, (128, 96)),
    ],
)
def test_sizes_of_frames(size, count, limits, expected):
    known = {"min_pixels": 128 * 32**2, "most": 768 * 32**2, "total_pixels": 128_000 * 32**2 * 0.9, "max_pixels": None}
    got = resizing.frame_size(size, count, 32, **{**known, **limits})
    assert got == expected and got[0] % 32 == got[1] % 32 == 0


def test_limits_that_cross_are_refused():
    with pytest.raises(ValueError, match="min_pixels=131072 is above max_pixels=5000"):
        resizing.frame_size((192, 128), 6, 32, min_pixels=128 * 32**2, most=768 * 32**2, total_pixels=1e8, max_pixels=5000)


def test_a_processor_resizes_long_films_again():
    limits = (4 * 32**2, 24576 * 32**2)
    assert resizing.film_again((448, 320), 12, 32, limits) == (448, 320)
    width, height = resizing.film_again((1152, 640), 64, 32, limits)
    assert (width, height) == (832, 448) and 64 * width * height <= limits[1]
    assert resizing.film_again((32, 32), 2, 32, limits) == (64, 64)


def test_films_are_resized_in_floats_and_rounded_a_few_frames_at_a_time():
    from torchvision.transforms import InterpolationMode, functional

    frames = np.random.default_rng(0).integers(0, 256, (resizing.TOGETHER + 3, 40, 60, 3), dtype=np.uint8)
    whole = torch.from_numpy(frames).permute(0, 3, 1, 2)
    whole = functional.resize(whole, [64, 96], interpolation=InterpolationMode.BICUBIC, antialias=True).permute(0, 2, 3, 1).numpy()
    ours = resizing.film_by_torchvision(list(frames), (96, 64))
    np.testing.assert_array_equal(ours, whole)
    pil = np.stack([np.asarray(Image.fromarray(f).resize((96, 64))) for f in frames])
    assert (ours != pil).any(), "PIL rounds between its two passes"
    floats = resizing.floats_by_torchvision(frames, (32, 32))
    rounded = resizing.film_by_torchvision(list(frames), (32, 32))
    assert np.abs(np.clip(floats, 0, 255) - rounded).max() <= 0.5 + 1e-3 and (floats != np.round(floats)).any()


def test_a_film_without_times_is_no_film():
    with pytest.raises(ValueError, match="expected a time for each frame"):
        Film(["a", "b"], [0.0])
