"""Vectors of another model, another tokenizer or another content are never taken for this one's."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_models import BUILDERS
from vlm2vec.cli import main
from vlm2vec.commands import common
from vlm2vec.evaluation.encode.keys import ContentHashes, identity_digest, item_key, model_identity
from vlm2vec.evaluation.encode.missing import fill_store
from vlm2vec.evaluation.encode.store import EmbeddingStore
from vlm2vec.model import VLM2Vec

TEXTS = {bytes([i]) * 16: {"text": text} for i, text in enumerate(["a fox", "a red fox", "a house"])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "qwen2_vl"
    place.mkdir()
    BUILDERS["qwen2_vl"](place)
    pictures = place.parent / "pictures"
    pictures.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
    return place


def edited(folder, target, name, change):
    """A copy of a model folder in which one JSON file is another."""
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text())
    change(content)
    (target / name).write_text(json.dumps(content))
    return target


def rotate_vocabulary(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    letters = [word for word in vocabulary if len(word) == 1]
    for word, number in zip(letters, [vocabulary[word] for word in letters[1:] + letters[:1]]):
        vocabulary[word] = number


def set_key(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


# file, what is changed in it: each gives other vectors with the same weights
OTHERS = {
    "rotated vocabulary": ("tokenizer.json", rotate_vocabulary),
    "lower-casing": ("tokenizer.json", set_key("normalizer", value={"type": "Lowercase"})),
    "image mean": ("preprocessor_config.json", set_key("image_mean", value=[0.1, 0.1, 0.1])),
    "rope base": ("config.json", set_key("text_config", "rope_parameters", "rope_theta", value=500.0)),
    "norm epsilon": ("config.json", set_key("text_config", "rms_norm_eps", value=0.01)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_store_knows_a_changed_file(folder, tmp_path, case):
    other = edited(folder, tmp_path / "other", *OTHERS[case])
    identities = [identity_digest(model_identity(VLM2Vec.from_pretrained(place, dtype="float32"))) for place in (folder, other)]
    assert identities[0] != identities[1]


def test_a_moved_model_keeps_its_store(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    one, other = (model_identity(VLM2Vec.from_pretrained(place, dtype="float32")) for place in (folder, tmp_path / "elsewhere"))
    assert one == other


def test_a_scaled_adapter_has_another_store(folder):
    identities = set()
    for alpha in (8, 16):
        torch.manual_seed(0)
        model = VLM2Vec.from_pretrained(folder, dtype="float32")
        model.add_adapter(r=4, alpha=alpha)
        identities.add(identity_digest(model_identity(model)))
    assert len(identities) == 2, "alpha stands in no tensor"


def filled(folder, tmp_path):
    model = VLM2Vec.from_pretrained(folder, dtype="float32")
    store = EmbeddingStore(tmp_path / "store", model_identity(model))
    fill_store(model, store, TEXTS, progress=False)
    (shard,) = store.folder.glob("shard-*.safetensors")
    return model, store.get(list(TEXTS)), shard


def reopened(model, tmp_path):
    store = EmbeddingStore(tmp_path / "store", model_identity(model))
    fill_store(model, store, TEXTS, progress=False)
    return store


def change_bytes(shard):
    content = bytearray(shard.read_bytes())
    content[-64:] = bytes(64)
    shard.write_bytes(content)


def not_finite(shard, **metadata):
    tensors = load_file(shard)
    tensors["embeddings"][1] = float("nan")
    save_file(tensors, shard, metadata=metadata)


def without_checksum(shard):
    save_file(load_file(shard), shard)


DAMAGED = {
    "64 changed bytes": (change_bytes, "checksum differs"),
    "NaN": (not_finite, "checksum differs"),
    "no checksum": (without_checksum, "checksum differs"),
    "cut short": (lambda shard: shard.write_bytes(shard.read_bytes()[:-40]), ""),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_shard_is_told_and_encoded_again(folder, tmp_path, case):
    damage, reason = DAMAGED[case]
    model, expected, shard = filled(folder, tmp_path)
    damage(shard)
    store = reopened(model, tmp_path)
    assert len(store.broken) == 1 and reason in store.broken[0] and shard.name in store.broken[0]
    assert torch.equal(store.get(list(TEXTS)), expected)
    assert shard.with_suffix(".broken").exists()


def test_a_shard_of_nans_whose_checksum_fits_is_not_scored(folder, tmp_path):
    """As a model or a program without the check would have written it."""
    from vlm2vec.evaluation.encode.store import checksum

    model, expected, shard = filled(folder, tmp_path)
    tensors = load_file(shard)
    tensors["embeddings"][:] = float("nan")
    save_file(tensors, shard, metadata={"checksum": checksum(tensors["embeddings"], tensors["keys"])})
    store = EmbeddingStore(tmp_path / "store", model_identity(model))
    with pytest.raises(ValueError, match=f"{shard.name} holds numbers that are not finite; remove it"):
        store.get(list(TEXTS))
    assert torch.equal(reopened(model, tmp_path).get(list(TEXTS)), expected)


def test_the_store_refuses_what_is_not_finite(folder, tmp_path):
    model, _, _ = filled(folder, tmp_path)
    store = EmbeddingStore(tmp_path / "store", model_identity(model))
    vectors = torch.ones(2, model.embedding_dim)
    vectors[1, 3] = float("inf")
    with pytest.raises(ValueError, match="vector 1 of 2 is not finite"):
        store.add([b"x" * 16, b"y" * 16], vectors)


# -- files of `vlm2vec embed` -------------------------------------------------------------------------------------------


def run(capsys, *words):
    code = main([str(word) for word in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def embedded(folder, tmp_path, capsys, *options):
    path = tmp_path / "pictures.safetensors"
    code, _, error = run(capsys, "embed", folder, folder.parent / "pictures", "-o", path, "--device", "cpu", *options)
    assert code == 0, error
    return path


def search(folder, path, capsys, *options):
    return run(capsys, "search", folder, "a fox", "--embeddings", path, "--device", "cpu", *options)


def test_search_takes_a_file_of_the_same_model(folder, tmp_path, capsys):
    path = embedded(folder, tmp_path, capsys)
    shutil.copytree(folder, tmp_path / "moved")
    for place in (folder, tmp_path / "moved"):
        code, out, error = search(place, path, capsys, "-k", 2)
        assert code == 0 and len(out.splitlines()) == 3 and "does not say" not in error
    assert search(folder, path, capsys, "--option", "max_pixels=3136")[0] == 0  # limits of images may differ


@pytest.mark.parametrize("case", ["rotated vocabulary", "rope base"])
def test_search_refuses_a_file_of_another_model(folder, tmp_path, capsys, case):
    path = embedded(folder, tmp_path, capsys)
    other = edited(folder, tmp_path / "other", *OTHERS[case])
    code, _, error = search(other, path, capsys)
    assert code == 2 and "was made by another model" in error and str(path) in error and len(error) < 500


def test_search_names_the_other_precision(folder, tmp_path, capsys):
    path = embedded(folder, tmp_path, capsys)
    code, _, error = search(folder, path, capsys, "--dtype", "bfloat16")
    assert code == 2 and "give --dtype float32" in error


def rewritten(path, change):
    with safe_open(path, "pt") as f:
        about = f.metadata()
    tensors = load_file(path)
    change(tensors, about)
    save_file(tensors, path, metadata=about)


def drop_key(tensors, about):
    about["keys"] = json.dumps(json.loads(about["keys"])[:-1])


def change_number(tensors, about):
    tensors["embeddings"][0, 0] += 1


def nan_row(tensors, about):
    tensors["embeddings"][2] = float("nan")
    about["checksum"] = common._checksum(tensors["embeddings"])


FILES = {
    "fewer keys": (drop_key, "2 keys for embeddings of shape (3, 32), expected one a row"),
    "keys no list": (lambda t, about: about.update(keys='"abc"'), "no list of keys"),
    "keys no JSON": (lambda t, about: about.update(keys="["), "is not a file of embeddings"),
    "one dimension": (lambda t, about: t.update(embeddings=t["embeddings"][0]), "expected one a row"),
    "changed number": (change_number, "is damaged"),
    "a row of NaN": (nan_row, "row 2 ("),
}


@pytest.mark.parametrize("case", FILES)
def test_search_refuses_a_file_that_is_not_as_written(folder, tmp_path, capsys, case):
    change, message = FILES[case]
    path = embedded(folder, tmp_path, capsys)
    rewritten(path, change)
    code, out, error = search(folder, path, capsys)
    assert code == 2 and not out and message in error and str(path) in error and len(error) < 500


def test_search_says_where_a_file_does_not_name_its_model(folder, tmp_path, capsys):
    path = embedded(folder, tmp_path, capsys)
    rewritten(path, lambda tensors, about: about.pop("model_identity"))
    code, _, error = search(folder, path, capsys)
    assert code == 0 and "does not say which model made it" in error


def test_embed_refuses_vectors_that_are_not_finite(folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    (embedding,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    weights[embedding][ord("z") + 20 :] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "out.safetensors"
    code, out, error = run(capsys, "embed", broken, "--text", "a", "--text", "zzzz ~ é", "-o", path, "--device", "cpu")
    assert code == 2 and not path.exists() and "input " in error and "not finite" in error and "float16" in error


def test_embed_does_not_replace_other_files(folder, tmp_path, capsys):
    mine = tmp_path / "model"
    shutil.copytree(folder, mine)
    before = (mine / "model.safetensors").read_bytes()
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    for target, message in (
        (mine / "model.safetensors", "no file of embeddings"),
        (mine / "adapter_model.safetensors", "has the name of a model's weights"),
        (mine / "model-00001-of-00002.safetensors", "has the name of a model's weights"),
        (foreign, "no file of embeddings"),
    ):
        code, _, error = run(capsys, "embed", mine, "--text", "a", "-o", target, "--device", "cpu")
        assert code == 2 and message in error and str(target) in error
    assert (mine / "model.safetensors").read_bytes() == before and "a" in load_file(foreign)
    again = tmp_path / "again.safetensors"
    for text in ("a", "b"):  # one's own file is replaced
        assert run(capsys, "embed", mine, "--text", text, "-o", again, "--device", "cpu")[0] == 0
    assert common.read_embeddings(str(again))[1] == ["b"]


def test_mining_into_its_own_data_is_refused(folder, tmp_path, capsys):
    from vlm2vec.data.mmeb import write_train

    row = {"qry": "q", "qry_image_path": "", "pos_text": "a", "pos_image_path": ""}
    write_train(tmp_path / "data", "Texts", [row] * 3)
    before = next((tmp_path / "data" / "Texts").glob("*.parquet")).read_bytes()
    code, _, error = run(capsys, "mine", folder, "--data", tmp_path / "data", "--images", tmp_path, "--output", tmp_path / "data" / ".")
    assert code == 2 and "whose files would be replaced" in error
    assert next((tmp_path / "data" / "Texts").glob("*.parquet")).read_bytes() == before


def test_what_is_said_of_one_film_is_part_of_its_key(folder):
    picture = str(folder.parent / "pictures/0.png")
    inputs = [{}, {"text": ""}, {"video": [picture]}, {"video": [picture], "fps": 1}, {"video": [picture], "fps": 2}, {"image": picture}]
    keys = {item_key(x, ContentHashes()) for x in inputs}
    assert len(keys) == len(inputs), "nothing at all is not an empty text, and a film at another rate is another film"
    assert item_key({"text": "a", "fps": None}, ContentHashes()) == item_key({"text": "a"}, ContentHashes())
