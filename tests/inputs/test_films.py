"""Films as phones, editors and downloads leave them: cut, turned, of any rate, with headers that lie; their times in the model."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.film_files import cut_without_encoding, number_of, shade, turn, write_film
from tests.helpers.tiny_models import qwen2_5_vl, qwen2_vl, qwen3_vl
from vlm2vec.media import Frames, read_frames
from vlm2vec.media.films import _guess, unpack
from vlm2vec.media.sampling import frame_indices
from vlm2vec.model import VLM2Vec

pytest.importorskip("av")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """60 frames of 10 a second; the last 20 of them under a header that says 60."""
    folder = tmp_path_factory.mktemp("films")
    whole = write_film(folder / "whole.mp4", [shade(i) for i in range(60)], rate=10, gop=60)
    cut = cut_without_encoding(whole, folder / "cut.mp4", 40)
    return folder, whole, cut


def shown(film, *args, **options):
    frames = read_frames(film, *args, **options)
    return [number_of(frame) for frame in frames], frames.seconds


# -- which frames ------------------------------------------------------------------------------------------------------


def of_the_authors(total, rate, fps, most):
    """qwen-vl-utils' smart_nframes and its linspace, written from its own lines."""
    least = 4
    most = min(768, total) // 2 * 2 if most is None else most // 2 * 2
    count = min(min(max(total / rate * fps, least), most), total) // 2 * 2
    return torch.linspace(0, total - 1, int(count)).round().long().tolist()


@pytest.mark.parametrize("most", [None, 4, 16, 64])
@pytest.mark.parametrize("fps", [0.5, 1, 2, 4])
@pytest.mark.parametrize("rate", [8, 10, 25, 32])
def test_frames_a_second_are_chosen_as_qwens_authors_do(rate, fps, most):
    for total in (4, 5, 17, 60, 61, 250, 799, 3000):
        assert frame_indices(total, fps=fps, max_frames=most, rate=rate) == of_the_authors(total, rate, fps, most), total


@pytest.mark.parametrize(
    ("total", "rate", "fps", "most", "count"),
    [
        (60, 10, 1, 64, 6),
        (900, Fraction(30000, 1001), 1, 64, 30),
        (9000, 30, 1, 64, 64),
        (9000, 30, 1, 7, 6),  # an even number
        (3, 30, 1, 64, 2),
        (1, 30, 1, 64, 1),
        (0, 30, 1, 64, 0),
    ],
)
def test_how_many_frames_a_second_give(total, rate, fps, most, count):
    chosen = frame_indices(total, fps=fps, max_frames=most, rate=rate)
    assert len(chosen) == count and chosen == sorted(set(chosen)) and (count < 2 or (chosen[0], chosen[-1]) == (0, total - 1))


@pytest.mark.parametrize(
    ("frames", "most", "wanted"), [(8, 4, [0, 19, 39, 59]), (4, 8, [0, 19, 39, 59]), (None, 2, [0, 59]), (1, None, [0])]
)
def test_a_maximum_holds_by_number_too(films, frames, most, wanted):
    numbers, seconds = shown(films[1], frames, max_frames=most)
    assert numbers == wanted and seconds == pytest.approx([n / 10 for n in wanted])


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"frames": 8}, [40, 42, 45, 48, 50, 53, 56, 59]),
        ({"frames": 3}, [40, 49, 59]),
        ({"frames": None}, list(range(40, 60))),
        ({"fps": 2}, [40, 46, 53, 59]),
        ({"fps": 5}, [40, 42, 44, 46, 48, 51, 53, 55, 57, 59]),
    ],
)
def test_a_header_that_lies_about_the_number_of_frames(films, options, wanted):
    _, _, cut = films
    assert _guess(str(cut))[0] == 60, "the header still says 60"
    numbers, seconds = shown(cut, **options)
    assert numbers == wanted and seconds == pytest.approx([(n - 40) / 10 for n in wanted])


def test_unpacked_frames_of_a_film_whose_header_lies(films, tmp_path):
    files = unpack(films[2], tmp_path / "frames", limit=10)
    assert [number_of(Image.open(file)) for file in files] == list(range(40, 60, 2))
    assert unpack(films[1], tmp_path / "whole", limit=10) and len(list((tmp_path / "whole").iterdir())) == 10


def test_a_container_without_a_count(tmp_path):
    film = write_film(tmp_path / "film.avi", [shade(i) for i in range(30)], rate=10)
    assert shown(film, 4) == ([0, 9, 19, 29], pytest.approx([0, 0.9, 1.9, 2.9]))
    film = write_film(tmp_path / "film.mkv", [shade(i) for i in range(30)], rate=10)
    assert shown(film, 4) == ([0, 9, 19, 29], pytest.approx([0, 0.9, 1.9, 2.9]))


def test_times_are_the_films_own_where_frames_are_not_evenly_spaced(tmp_path):
    film = write_film(tmp_path / "slides.mkv", [shade(i) for i in range(6)], rate=4, times=[8, 9, 10, 12, 40, 80])
    assert shown(film, None)[1] == pytest.approx([0, 0.25, 0.5, 1, 8, 18]), "counted from the first frame"


# -- rotation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quarters", "size", "corner"), [(0, (64, 48), 0), (1, (48, 64), 1), (2, (64, 48), 3), (3, (48, 64), 2)])
def test_phones_film_sideways(tmp_path, quarters, size, corner):
    """A film whose top left is white, to be shown turned clockwise: white goes to the top right, bottom right, bottom left."""
    grey = np.kron(np.array([[255, 0], [0, 0]], dtype=np.uint8), np.ones((24, 32), dtype=np.uint8))
    film = turn(write_film(tmp_path / "phone.mp4", [Image.fromarray(grey).convert("RGB")] * 4), quarters)
    for frame in read_frames(film, 2):
        values = np.asarray(frame.convert("L"))[[8, 8, -8, -8], [8, -8, 8, -8]]
        assert frame.size == size and values.argmax() == corner and values.max() > 200 and np.sort(values)[-2] < 50


# -- times in the model ------------------------------------------------------------------------------------------------


def stamps(model, video):
    text = model.processing.tokenizer.decode(model.preprocess([{"video": video}])[0].input_ids)
    return [float(second) for second in re.findall(r"<([\d.]+) seconds>", text)]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3") / "Qwen3-VL-Embedding-2B"
    folder.mkdir()
    qwen3_vl(folder)
    return VLM2Vec.from_pretrained(folder)


def test_the_published_embedder_takes_a_frame_a_second(embedder, films):
    assert {name: embedder.options[name] for name in ("fps", "max_frames")} == {"fps": 1.0, "max_frames": 64}
    assert stamps(embedder, films[1]) == [0.6, 3.0, 5.3]  # frames at 0, 1.2, 2.4, 3.5, 4.7 and 5.9 s, in pairs
    assert stamps(embedder, films[2]) == [0.3, 1.6]


def test_frames_whose_times_nobody_knows_are_two_a_second(embedder, films, tmp_path):
    frames = [shade(i) for i in range(6)]
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"{number}.png")
    assert stamps(embedder, frames) == stamps(embedder, tmp_path) == [0.2, 1.2, 2.2]
    assert stamps(embedder, Frames(frames, [0, 10, 20, 30, 40, 50])) == [5.0, 25.0, 45.0]
    longer = [shade(i % 60) for i in range(100)]
    assert len(stamps(embedder, longer)) == 32, "the authors keep 64 frames of a longer list"


def test_a_family_that_counts_real_time_takes_the_films(films, tmp_path):
    qwen2_5_vl(tmp_path)
    model = VLM2Vec.from_pretrained(tmp_path, positions="mrope", frames=4)

    def spacing(video, **options):
        made = type(model.processing)(model.processing.tokenizer, model.processing.image_processor, model.config, model.options | options)
        return made.process_video(made.frames(video)).grid[3] / made.tokens_per_second

    assert spacing(films[1]) == pytest.approx(2 * 5.9 / 3)
    assert spacing(films[1], seconds_per_step=1.5) == 1.5
    assert spacing([shade(0), shade(1)]) == 1.0, "frames whose times nobody knows are as before"


def test_encode_takes_a_film_of_any_of_these(films, tmp_path):
    qwen2_vl(tmp_path)
    model = VLM2Vec.from_pretrained(tmp_path)
    same = [{"video": str(films[2])}, {"video": read_frames(films[2], 8)}]
    rows = model.encode(same)
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fps": 0}, "fps=0: expected a number above 0, or None"),
        ({"fps": float("nan")}, "fps=nan: expected a number above 0, or None"),
        ({"fps": "two"}, "fps='two': expected a number above 0, or None"),
        ({"max_frames": 0}, "max_frames=0: expected an integer of at least 1, or None"),
        ({"frames": 0}, "frames=0: expected an integer of at least 1"),
    ],
)
def test_options_of_films_are_checked(tmp_path, options, said):
    qwen2_vl(tmp_path)
    with pytest.raises(ValueError, match=re.escape(said)):
        VLM2Vec.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b"junk"), "cannot be decoded"),
        (lambda path: path.write_bytes(b""), "cannot be decoded"),
        (lambda path: None, "no such file or folder of frames"),
        (lambda path: path.mkdir(), "no frame images"),
        (lambda path: write_film(path, [shade(0)] * 4) and path.write_bytes(path.read_bytes()[:-200]), "cannot be decoded"),
    ],
)
def test_what_is_no_film_is_named(tmp_path, make, said):
    path = tmp_path / "odd.mp4"
    make(path)
    with pytest.raises(ValueError, match=f"odd.mp4: .*{said}|odd.mp4: {said}"):
        read_frames(path, 4)
