"""`vlm2vec embed --shards`: streamed, resumed, shared among ranks, and the same vectors as `embed` makes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.helpers.command_line import call
from tests.helpers.repository import ROOT
from tests.helpers.stub_model import vector
from tests.helpers.tiny_models import qwen2_vl
from vlm2vec import VLM2Vec, encoding
from vlm2vec.commands import common
from vlm2vec.data.bulk.embedding import embed_shards, settle
from vlm2vec.data.bulk.inputs import stream
from vlm2vec.data.bulk.shards import COMPLETE, read_shards

TEXTS = [f"{'word ' * (i % 7)}{i}" for i in range(50)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("shards")
    qwen2_vl(place / "model")
    (place / "pictures").mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(place / f"pictures/{i}.png")
    rows = [{"key": f"t{i}", "text": text} for i, text in enumerate(TEXTS)]
    rows[7] = {"key": "seen", "image": "pictures/1.png", "text": "what?"}
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return place


@pytest.fixture(scope="module")
def truth(place):
    """{key: vector} as one file of `embed` has them."""
    from vlm2vec.cli import main

    out = place / "whole.safetensors"
    assert main(["embed", *map(str, (place / "model", place / "rows.jsonl", place / "pictures")), "-o", str(out), "--device", "cpu"]) == 0
    rows, keys, _ = common.read_embeddings(str(out))
    return dict(zip(keys, rows.numpy()))


def held(folder):
    shards, _ = read_shards(folder)
    return {key: row for shard in shards for key, row in zip(shard.keys, shard.embeddings.numpy())}


def require_same(got, truth):
    assert list(got) == list(truth)
    np.testing.assert_allclose(np.stack(list(got.values())), np.stack(list(truth.values())), atol=1e-6)


def run(place, folder, *more):
    return [*map(str, ("embed", place / "model", place / "rows.jsonl", place / "pictures", "--shards", folder, "--device", "cpu", *more))]


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_the_same_vectors_in_shards(place, truth, tmp_path, capsys, kind):
    words = run(place, tmp_path / "s", "--shard-rows", 20, "--format", kind)
    code, told, _ = call(capsys, *words)
    assert code == 0 and "53 embedded, 0 were there, of 53 inputs" in told
    require_same(held(tmp_path / "s"), truth)
    names = [f"shard-0000{i}.{kind}" for i in range(3)]
    assert json.loads((tmp_path / "s" / COMPLETE).read_text())["shards"] == names
    if kind == "parquet":
        table = pq.read_table(tmp_path / "s" / names[0])
        np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), list(truth.values())[:20], atol=1e-6)
    (tmp_path / "s" / names[1]).unlink()
    code, told, _ = call(capsys, *words)
    assert code == 0 and "20 embedded, 33 were there, of 53 inputs" in told
    require_same(held(tmp_path / "s"), truth)
    found = call(capsys, "search", place / "model", "a word", "--embeddings", tmp_path / "s", "--json", "-k", 60, "--prompt", "")[1]
    scores = {hit["key"]: hit["score"] for hit in json.loads(found)[0]["results"]}
    query = VLM2Vec.from_pretrained(place / "model", device="cpu").encode("a word")
    assert scores == pytest.approx({key: float(query @ row) for key, row in truth.items()}, abs=1e-5)


def test_other_settings_and_folders_are_refused(place, tmp_path, capsys):
    call(capsys, *run(place, tmp_path / "s"))
    for more, said in ((("--as", "document"), "other as"), (("--shard-rows", 5), "other shard_rows"), (("--dtype", "bfloat16"), "other")):
        code, _, told = call(capsys, *run(place, tmp_path / "s", *more))
        assert code == 2 and said in told and told.count("\n") == 1
    code, _, told = call(capsys, *run(place, place / "pictures"))
    assert code == 2 and "holds other files and no settings.json" in told
    code, _, told = call(capsys, *run(place, tmp_path / "t"), "-o", tmp_path / "e.safetensors")
    assert code == 2 and "one of them" in told


def pairs(count, changed=()):
    return [(f"k{i}", f"other {i}" if i in changed else f"text {i}") for i in range(count)]


def encoder(seen, window=7):
    """As `encode_stream`, by the stub; counts what it embeds. Inputs that begin with BAD cannot be read."""

    def encode(inputs):
        inputs = iter(inputs)
        while some := [x for _, x in zip(range(window), inputs)]:
            seen.extend(some)
            yield torch.stack([vector(x) for x in some]), {i: "bad" for i, x in enumerate(some) if x.startswith("BAD")}

    return encode


def embedded(folder, inputs, rank=0, world=1, rows=10):
    seen = []
    done = embed_shards(lambda: inputs, folder, encoder(seen), rows=rows, kind="safetensors", about={}, rank=rank, world=world)
    return done, seen


def require_pairs(folder, inputs):
    got = held(folder)
    assert list(got) == [key for key, _ in inputs]
    assert all(np.array_equal(got[key], vector(x).numpy()) for key, x in inputs)


def test_ranks_share_and_another_number_of_them_goes_on(tmp_path):
    folder, inputs = tmp_path / "s", pairs(47)
    settle(folder, {"a": 1})
    assert len(embedded(folder, inputs, 1, 3)[1]) == 17 and not (folder / COMPLETE).exists()
    assert len(embedded(folder, inputs, 0, 3)[1]) == 20 and not (folder / COMPLETE).exists()
    done, seen = embedded(folder, inputs)
    assert (len(seen), done.made, done.kept, done.rows) == (10, 10, 37, 47)
    require_pairs(folder, inputs)


def test_inputs_that_changed_are_embedded_again_shard_by_shard(tmp_path):
    folder = tmp_path / "s"
    settle(folder, {})
    embedded(folder, pairs(35))
    done, seen = embedded(folder, pairs(41, {12}))
    assert (done.made, done.kept, len(seen)) == (21, 20, 21), "the shard of row 12, the last that grew, and a new one"
    require_pairs(folder, pairs(41, {12}))
    done, _ = embedded(folder, pairs(9))
    require_pairs(folder, pairs(9))
    assert len(list(folder.glob("shard-*"))) == 1
    content = bytearray((folder / "shard-00000.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "shard-00000.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="shard-00000.safetensors is damaged"):
        read_shards(folder)
    (folder / "shard-00000.safetensors").write_bytes(content[:40])
    assert embedded(folder, pairs(9))[0].made == 9, "what does not read back is made anew"
    require_pairs(folder, pairs(9))


def test_a_complete_set_never_holds_shards_of_other_inputs(tmp_path):
    """Not where a rerun of changed rows is killed, not where one rank of two has run, not where a file was put in another's place."""
    folder, before, now = tmp_path / "s", pairs(30), pairs(30, range(30))
    settle(folder, {})
    embedded(folder, before)

    def killed(inputs):
        for number, made in enumerate(encoder([], window=5)(inputs)):
            if number == 3:
                raise KeyboardInterrupt
            yield made

    with pytest.raises(KeyboardInterrupt):
        embed_shards(lambda: now, folder, killed, rows=10, kind="safetensors", about={})
    with pytest.raises(ValueError, match="no complete set of shards"):
        read_shards(folder)
    embedded(folder, before)
    require_pairs(folder, before)
    embedded(folder, now, 0, 2)
    with pytest.raises(ValueError, match="no complete set of shards"):
        read_shards(folder)
    embedded(folder, now, 1, 2)
    require_pairs(folder, now)
    (folder / "shard-00001.safetensors").write_bytes((folder / "shard-00000.safetensors").read_bytes())
    with pytest.raises(ValueError, match="shard-00001.safetensors is of other inputs than embeddings.json says"):
        read_shards(folder)


def test_what_cannot_be_read_is_left_out_and_named(tmp_path):
    folder, inputs = tmp_path / "s", [(f"k{i}", "BAD" if i in (3, 10, 11, 29) else f"text {i}") for i in range(30)]
    settle(folder, {})
    done, _ = embedded(folder, inputs)
    assert set(done.left_out) == {"k3", "k10", "k11", "k29"} and (done.made, done.bad) == (26, 4)
    require_pairs(folder, [pair for pair in inputs if pair[1] != "BAD"])
    assert read_shards(folder)[0][1].left_out == {"k10": "bad", "k11": "bad"}
    settle(tmp_path / "t", {})
    done, _ = embedded(tmp_path / "t", [("same key", x) for _, x in inputs])
    assert (done.made, done.kept, done.bad, len(done.left_out)) == (26, 0, 4, 1)


def test_inputs_are_read_as_they_are_needed(place):
    """The stream is two windows ahead of the model at most, and gives what `encode` gives."""
    model, given, made = VLM2Vec.from_pretrained(place / "model", device="cpu"), [0], []

    def counted():
        for i in range(100):
            given[0] += 1
            yield f"text {i}" if i != 50 else {"text": 7}

    for vectors, bad in encoding.encode_stream(model, counted(), batch_size=1, skip_bad=True):
        assert len(vectors) <= encoding.WINDOW_CHUNKS and given[0] <= len(made) + 2 * encoding.WINDOW_CHUNKS
        assert set(bad) == ({50 - len(made)} if 0 <= 50 - len(made) < len(vectors) else set())
        made += vectors
    made[50] = torch.from_numpy(model.encode("text 50"))
    np.testing.assert_allclose(torch.stack(made), model.encode([f"text {i}" for i in range(100)]), atol=1e-6)
    with pytest.raises(ValueError, match="input 50: 'text' must be a str"):
        list(encoding.encode_stream(model, counted(), batch_size=1))


def test_rows_of_parquet_and_jsonl(tmp_path):
    content = (tmp_path / "a.png", b"bytes")
    content[0].write_bytes(b"file")
    table = {"id": [5, 6, 7], "image": [None, "a.png", "/b.png"], "text": ["x", None, "z"], "other": [1, 2, 3]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    got = list(stream([str(tmp_path / "t.parquet")], ["last"]))
    assert got == [
        ("5", {"text": "x"}),
        ("6", {"image": str(tmp_path / "a.png")}),
        ("7", {"image": "/b.png", "text": "z"}),
        ("last", "last"),
    ]
    pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / "b.parquet")
    assert list(stream([str(tmp_path / "b.parquet")], [])) == [("0", {"image": b"1"}), ("1", {"image": b"2"})]
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "c.parquet")
    (tmp_path / "d.jsonl").write_text('"a text"\n\n[1]\n')
    (tmp_path / "e.parquet").write_text("none")
    for name, said in (("c.parquet", "expected some of text"), ("d.jsonl", "line 3: expected an object"), ("e.parquet", "not a parquet")):
        with pytest.raises(ValueError, match=said):
            list(stream([str(tmp_path / name)], []))


def torchrun(place, folder):
    """Two ranks under torchrun, as a user starts them."""
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    words = run(place, folder, "--shard-rows", 5, "--batch-size", 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vlm2vec.cli", *words]
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True)


@pytest.mark.slow
def test_two_ranks_are_killed_and_go_on(place, truth, tmp_path, capsys):
    folder = tmp_path / "s"
    running = torchrun(place, folder)
    end = time.monotonic() + 120
    while running.poll() is None and not list(folder.glob("shard-*")) and time.monotonic() < end:
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    there = len(list(folder.glob("shard-*.safetensors")))
    assert there, "no shard was written"
    code, told, _ = call(capsys, *run(place, folder, "--shard-rows", 5, "--batch-size", 1))
    assert code == 0 and f"{53 - min(53, 5 * there)} embedded" in told
    require_same(held(folder), truth)
