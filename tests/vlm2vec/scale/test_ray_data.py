"""The embedder of Ray Data: the same vectors as `embed`; on local Ray with two workers, of which one is killed on the way."""

import base64
import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.helpers.repository import ROOT
from tests.helpers.tiny_models import qwen2_vl
from vlm2vec.ray import ERROR, Embedder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("ray")
    qwen2_vl(place / "model")
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def model(place):
    from vlm2vec import VLM2Vec

    return VLM2Vec.from_pretrained(place / "model", device="cpu")


def objects(*values):
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out


def test_a_batch(place, model):
    embedder = Embedder(str(place / "model"), device="cpu", root=str(place), columns={"text": "caption"})
    content = (place / "1.png").read_bytes()
    batch = {"n": np.arange(4), "caption": objects("a", None, "b", "c"), "image": objects(None, "0.png", content, float("nan"))}
    made = embedder(batch)
    assert set(made) == {"n", "caption", "image", "embedding"} and made["embedding"].dtype == np.float32
    truth = model.encode(["a", {"image": place / "0.png"}, {"text": "b", "image": place / "1.png"}, "c"])
    np.testing.assert_allclose(made["embedding"], truth, atol=1e-6)
    assert Embedder(str(place / "model"), device="cpu", truncate_dim=5)({"text": np.array(["a"])})["embedding"].shape == (1, 5)


def test_paths_of_every_form_begin_at_root(place, model):
    """What `embed` takes as a row's pictures, as Ray hands it over: arrays of paths, dictionaries with or without bytes, data: URIs."""
    content = (place / "1.png").read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    many, one, both = objects("0.png", "1.png"), {"bytes": None, "path": "1.png"}, {"bytes": content, "path": "elsewhere.png"}
    pixels = np.asarray(Image.open(place / "1.png"))
    batch = {"image": objects(many, one, both, uri, np.array(["1.png"]), str(place / "1.png"), pixels)}
    made = Embedder(str(place / "model"), device="cpu", root=str(place))(batch)["embedding"]
    truth = model.encode([{"image": [place / "0.png", place / "1.png"]}, {"image": place / "1.png"}])
    np.testing.assert_allclose(made, truth[[0] + [1] * 6], atol=1e-6)


def test_roles_and_rows_that_cannot_be_read(place, model):
    batch = {"text": objects("a", "b"), "image": objects(None, "gone.png")}
    with pytest.raises(ValueError, match=r"input 1: .*gone.png"):
        Embedder(str(place / "model"), device="cpu")(batch)
    made = Embedder(str(place / "model"), device="cpu", skip_bad=True, role="query")(batch)
    assert made[ERROR][0] == "" and "gone.png" in made[ERROR][1] and not made["embedding"][1].any()
    from vlm2vec.checkpoint.words import said_as

    np.testing.assert_allclose(made["embedding"][0], model.encode(said_as(model, ["a"], "query")[0])[0], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"role": "passage"}, "expected query or document"),
        ({"role": "query", "prompt": "x"}, "no prompt beside it"),
        ({"columns": {"words": "x"}}, "expected names among text"),
    ],
)
def test_misuse(place, options, said):
    with pytest.raises(ValueError, match=said):
        Embedder(str(place / "model"), device="cpu", **options)
    with pytest.raises(ValueError, match="expected some of text"):
        Embedder(str(place / "model"), device="cpu")({"n": np.arange(2)})


KILLED_BATCH = 5


def test_one_of_two_workers_is_killed(place, model, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed; pip install 'vlm2vec[ray]'")
    pytest.importorskip("ray.data", reason="Ray is not installed with its data part; pip install 'vlm2vec[ray]'")
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from ray_data_embedding import embed
    finally:
        sys.path.pop(0)

    texts = [f"{'word ' * (i % 5)}{i}" for i in range(120)]
    pq.write_table(pa.table({"id": range(120), "text": texts}), tmp_path / "rows.parquet")
    log = str(tmp_path / "batches.txt")

    class Mortal(Embedder):
        """Writes down its batches, and dies once in the midst of one."""

        def __call__(self, batch):
            first = int(batch["id"][0])
            before = open(log).read().split() if os.path.exists(log) else []
            with open(log, "a") as f:
                f.write(f"{first}\n")
            if first == 10 * KILLED_BATCH and str(first) not in before:
                os._exit(9)
            return super().__call__(batch)

    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    ray.init(
        num_cpus=4,  # two for the workers, the others to read and write
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}},
    )
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        embed(
            str(tmp_path / "rows.parquet"),
            str(tmp_path / "out"),
            str(place / "model"),
            workers=2,
            gpus=0,
            batch_size=10,
            embedder=Mortal,
            device="cpu",
        )
    finally:
        ray.shutdown()
    table = pq.read_table(tmp_path / "out").sort_by("id")
    assert table["id"].to_pylist() == list(range(120)) and table["text"].to_pylist() == texts, "no row is lost or doubled"
    np.testing.assert_allclose(np.stack([np.asarray(row) for row in table["embedding"].to_pylist()]), model.encode(texts), atol=1e-6)
    begun = [int(line) for line in open(log).read().split()]
    assert begun.count(10 * KILLED_BATCH) == 2 and set(begun) == set(range(0, 120, 10))
    print(f"batches begun: {len(begun)} for 12")
    assert len(begun) <= 12 + 4, begun
