"""Which frames of a film are taken, against the reference's own line, and in which order frame files stand."""

import numpy as np
import pytest
from PIL import Image

from train.data.sources import open_source
from train.recipe.schema import Data, Source
from vlm2vec.evaluation.loaders.video_root import VideoRoot
from vlm2vec.evaluation.tasks import load_tasks
from vlm2vec.media.films import read_frames
from vlm2vec.media.sampling import frame_files, frame_indices, natural_order, sample


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 13, 64])
def test_indices_are_the_integer_part_of_linspace(frames):
    for total in range(frames, 3000):  # rounding differs from total to total; 3,000 frames are two minutes
        assert frame_indices(total, frames) == np.linspace(0, total - 1, frames).astype(int).tolist(), total


def test_a_film_with_fewer_frames_is_used_whole():
    assert frame_indices(3, 8) == [0, 1, 2] and frame_indices(0, 8) == [] and frame_indices(9, None) == list(range(9))
    assert sample("abcdefghi", 3) == ["a", "e", "i"] and sample("ab", 3) == ["a", "b"]


def test_frame_files_stand_in_natural_order(tmp_path):
    for name in ("f_10.png", "f_9.png", "f_09.png", "f_100.JPG", "f_1.webp", "notes.txt"):
        (tmp_path / name).touch()
    assert [file.rpartition("/")[2] for file in frame_files(tmp_path)] == ["f_1.webp", "f_09.png", "f_9.png", "f_10.png", "f_100.JPG"]
    assert frame_files(tmp_path / "gone") == []
    assert sorted(["2/10.png", "10/9.png"], key=natural_order) == ["10/9.png", "2/10.png"], "the file's name counts, not its folder"


def test_encoding_training_and_evaluation_take_the_same_frames(tmp_path):
    """Frame files without leading zeros, as many tools write them: 21 of them, so that rounding and plain order both show."""
    folder = tmp_path / "Breakfast" / "v1"
    folder.mkdir(parents=True)
    for number in range(1, 22):
        Image.new("RGB", (28, 28)).save(folder / f"frame_{number}.png")
    said = '[{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "eggs"}]'
    (tmp_path / "rows.jsonl").write_text(f'{{"video": "v1", "conversations": {said}}}\n')
    source = Source("own", format="video_to_caption", file="rows.jsonl")
    data = Data(root=str(tmp_path), images=str(tmp_path / "Breakfast"), sources=[source])
    query, _, _ = open_source(data, source).row(0, 8)
    evaluated = VideoRoot(load_tasks()["Breakfast"], tmp_path, tmp_path / "cache").item("", "v1")
    wanted = [str(folder / f"frame_{number}.png") for number in (1, 3, 6, 9, 12, 15, 18, 21)]
    assert read_frames(folder, 8) == wanted
    assert query["video"] == wanted
    assert evaluated["video"] == wanted
