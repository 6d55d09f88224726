"""mteb's whole grid of mock tasks about text, pictures and films runs; OpenMoji through mteb scores what `vlm2vec eval` scores."""

import math

import numpy as np
import pytest

mteb = pytest.importorskip("mteb")
pytest.importorskip("av")

from mteb.mocks import mock_tasks

from vlm2vec import VLM2Vec
from vlm2vec.evaluation.mteb_model import MTEBEncoder
from vlm2vec.evaluation.runner import Options, run_tasks
from vlm2vec.evaluation.tasks import find_tasks
from vlm2vec.inputs import MODALITIES
from vlm2vec.quickstart import build
from vlm2vec.quickstart.benchmark import Size


def grid() -> list[str]:
    """Mock tasks of the modalities that a model here has; an aggregate's are its parts'."""
    tasks = {name: getattr(mock_tasks, name) for name in dir(mock_tasks) if name.startswith("Mock")}
    return [name for name, task in tasks.items() if set(task.metadata.modalities) <= set(MODALITIES)]


# One sample a class or constant scores: the metric itself is not a number, with any model.
UNDEFINED = {"MockVisualSTSTask"}


@pytest.fixture(scope="module")
def encoder(golden):
    return MTEBEncoder(str(golden / "qwen2_vl"), device="cpu", max_pixels=56 * 56)


def scores(encoder, task) -> dict:
    result = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False)
    return next(iter(result.task_results[0].scores.values()))[0]


@pytest.mark.parametrize("name", grid())
def test_mock_task(name, encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("MTEB_CACHE", str(tmp_path))
    main = scores(encoder, getattr(mock_tasks, name)())["main_score"]
    assert math.isnan(main) if name in UNDEFINED else -1.0 <= main <= 1.0


def test_the_grid_is_mtebs():
    """All kinds are there: text, pictures, films, and films beside texts."""
    kinds = {tuple(sorted(getattr(mock_tasks, name).metadata.modalities)) for name in grid()}
    assert kinds == {("text",), ("image",), ("image", "text"), ("video",), ("text", "video")}


def film(path, colours):
    """An mp4 of one flat colour a frame."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 56, 56, "yuv420p"
        for colour in colours:
            frame = av.VideoFrame.from_ndarray(np.full((56, 56, 3), colour, dtype=np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("stored_as", ["bytes", "path"])
def test_films_are_what_encode_makes_of_their_files(stored_as, encoder, tmp_path):
    """A loader of undecoded films, and the texts of the other side: the vectors of `VLM2Vec.encode`."""
    from datasets import Dataset, Features, Value, Video
    from torch.utils.data import DataLoader

    paths = [str(film(tmp_path / f"{i}.mp4", range(20 * i, 200, 10 + i))) for i in range(3)]
    rows = [{"bytes": open(p, "rb").read(), "path": None} if stored_as == "bytes" else {"bytes": None, "path": p} for p in paths]
    films = Dataset.from_dict({"id": list("abc"), "video": rows}, features=Features({"id": Value("string"), "video": Video()}))
    metadata = mock_tasks.MockVideoRetrievalT2V.metadata
    found = encoder.encode(DataLoader(films, batch_size=2), task_metadata=metadata, prompt_type="document")
    instruction = {"instruction": "Represent the given image."}
    np.testing.assert_allclose(found, encoder.model.encode([{"video": p, **instruction} for p in paths]), atol=1e-6)
    texts = DataLoader(Dataset.from_dict({"text": ["a red film", "a blue one"]}), batch_size=2)
    found = encoder.encode(texts, task_metadata=metadata, prompt_type="query")
    np.testing.assert_allclose(found, encoder.model.encode(["a red film", "a blue one"]), atol=1e-6)


# -- OpenMoji: the same rows as tasks of mteb -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openmoji(tmp_path_factory, golden):
    """A small OpenMoji benchmark, and its scores by `vlm2vec eval`."""
    folder = tmp_path_factory.mktemp("quickstart")
    size = Size(subjects=32, drawings=2, pairs=16, quads=8)
    build.build_data(folder, seed=3, size=size, workers=1, say=None)
    data, images = folder / "data" / "eval", folder / "data" / "images"
    model = VLM2Vec.from_pretrained(golden / "qwen2_vl", device="cpu")
    tasks = find_tasks(data, ["OpenMoji-Object", "OpenMoji_t2i"])
    results = run_tasks(model, tasks, data, images, folder / "scores", options=Options(progress=False))
    return model, data, images, {row["task"]: row for row in results}


def rows_of(data, name):
    from datasets import load_dataset

    return load_dataset("parquet", data_files=str(next((data / name).rglob("*.parquet"))), split="train")


def described(parent, name, kind, prompt):
    """A task of mteb's with metadata of its own."""
    from mteb.abstasks.task_metadata import TaskMetadata

    filled = {**parent.metadata.model_dump(), "name": name, "type": kind, "prompt": {"query": prompt}}
    return TaskMetadata(**filled)


def test_zero_shot_classification_equals_eval(openmoji):
    from datasets import Dataset, DatasetDict
    from PIL import Image

    model, data, images, expected = openmoji
    rows = rows_of(data, "OpenMoji-Object")
    names = sorted({text for row in rows for text in row["tgt_text"]})
    prompt = rows[0]["qry_text"].partition("\n")[2].strip()
    table = {
        "image": [Image.open(images / row["qry_img_path"]) for row in rows],
        "label": [names.index(row["tgt_text"][0]) for row in rows],
    }

    class OpenMojiObject(mock_tasks.MockZeroShotClassificationTask):
        metadata = described(mock_tasks.MockZeroShotClassificationTask, "OpenMojiObject", "ZeroShotClassification", prompt)

        def load_data(self, **kwargs):
            self.dataset = DatasetDict({"test": Dataset.from_dict(table)})
            self.data_loaded = True

        def get_candidate_labels(self):
            return names

    found = scores(MTEBEncoder(model), OpenMojiObject())
    assert len(names) == len(rows[0]["tgt_text"]), "every query has all names for candidates"
    assert found["accuracy"] == pytest.approx(expected["OpenMoji-Object"]["score"])
