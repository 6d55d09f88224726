"""Model folders whose files have another shape, lack keys, hold absurd numbers or things that nobody should unpickle."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.command_line import assert_refused, assert_runs
from tests.helpers.tiny_models import BUILDERS
from vlm2vec.model import VLM2Vec

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A full model and an adapter on it."""
    root = tmp_path_factory.mktemp("folders")
    (root / "plain").mkdir()
    BUILDERS["qwen2_vl"](root / "plain")
    model = VLM2Vec.from_pretrained(root / "plain", dtype="float32")
    model.save_pretrained(root / "full")
    model.add_adapter(r=4, alpha=8)
    model.save_pretrained(root / "adapter")
    return root


def text(content):
    return lambda path: path.write_text(content)


def raw(content):
    return lambda path: path.write_bytes(content)


def key(*names, value):
    """Sets a key of a JSON file; the names lead to it."""

    def change(path):
        content = json.loads(path.read_text())
        inner = content
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = value
        path.write_text(json.dumps(content))

    return change


def without(*names):
    def change(path):
        content = json.loads(path.read_text())
        inner = content
        for name in names[:-1]:
            inner = inner[name]
        del inner[names[-1]]
        path.write_text(json.dumps(content))

    return change


def fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def gone(path):
    path.unlink()


def tensors(change):
    def edit(path):
        held = load_file(path)
        change(held)
        save_file(held, path, metadata={"format": "pt"})

    return edit


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/unpickled-by-a-test",)


def pickled(path):
    (path.parent / path.name).write_bytes(pickle.dumps({"weight": Evil()}))


SHAPES = {
    "a list": "[]",
    "null": "null",
    "a number": "3",
    "a text": '"x"',
    "nothing": "",
    "half": '{"a": ',
    "deep": DEEP,
    "a deep object": '{"a":' * 100_000,
    "Latin-1": b'{"a": "\xe9"}',
    "zeros": bytes(100),
}
# file -> shapes of it that are refused
SHAPED = {
    "config.json": list(SHAPES),
    "vlm2vec.json": list(SHAPES),
    "tokenizer.json": list(SHAPES),
    "tokenizer_config.json": list(SHAPES),
    "processor_config.json": list(SHAPES),
    "adapter_config.json": list(SHAPES),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name, shapes in SHAPED.items() for shape in shapes])
def test_a_file_of_another_shape(places, tmp_path, capsys, name, shape):
    model = tmp_path / "model"
    shutil.copytree(places / ("adapter" if name == "adapter_config.json" else "full"), model)
    content = SHAPES[shape]
    (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(capsys, ["embed", model, "--text", "a", "-o", tmp_path / "out.safetensors", "--device", "cpu"], name)


# id: (full or adapter, file, change, what the message names)
CASES = {
    "no text_config": ("full", "config.json", without("text_config"), ["config.json", "text_config"]),
    "no vision_config": ("full", "config.json", without("vision_config"), ["config.json", "vision_config"]),
    "text_config null": ("full", "config.json", key("text_config", value=None), ["config.json", "text_config"]),
    "text_config a list": ("full", "config.json", key("text_config", value=[]), ["config.json", "text_config"]),
    "text_config empty": ("full", "config.json", key("text_config", value={}), ["config.json", "text_config"]),
    "vision_config a number": ("full", "config.json", key("vision_config", value=3), ["config.json", "vision_config"]),
    "model_type null": ("full", "config.json", key("model_type", value=None), ["config.json", "model_type"]),
    "model_type a number": ("full", "config.json", key("model_type", value=5), ["config.json", "model_type"]),
    "model_type a list": ("full", "config.json", key("model_type", value=["qwen2_vl"]), ["config.json", "model_type"]),
    "model_type of a text model": ("full", "config.json", key("model_type", value="bert"), ["bert"]),
    "model_type unknown": ("full", "config.json", key("model_type", value="qwen9_vl"), ["qwen9_vl"]),
    "model_type very long": ("full", "config.json", key("model_type", value="x" * 5000), ["model_type"]),
    "hidden_size 0": ("full", "config.json", key("text_config", "hidden_size", value=0), ["hidden_size"]),
    "hidden_size a text": ("full", "config.json", key("text_config", "hidden_size", value="big"), ["hidden_size"]),
    "hidden_size negative": ("full", "config.json", key("text_config", "hidden_size", value=-32), ["hidden_size"]),
    "hidden_size absurd": ("full", "config.json", key("text_config", "hidden_size", value=10**12), ["hidden_size"]),
    "no attention heads": ("full", "config.json", key("text_config", "num_attention_heads", value=0), ["num_attention_heads"]),
    "heads that do not divide": ("full", "config.json", key("text_config", "num_attention_heads", value=7), ["model"]),
    "layers absurd": ("full", "config.json", key("text_config", "num_hidden_layers", value=10**9), ["num_hidden_layers"]),
    "vocabulary absurd": ("full", "config.json", key("text_config", "vocab_size", value=10**13), ["vocab_size"]),
    "vocabulary of none": ("full", "config.json", key("text_config", "vocab_size", value=0), ["vocab_size"]),
    "patch size 0": ("full", "config.json", key("vision_config", "patch_size", value=0), ["patch_size"]),
    "rope parameters a number": ("full", "config.json", key("text_config", "rope_parameters", value=4), ["config.json"]),
    "unknown rope": ("full", "config.json", key("text_config", "rope_parameters", "rope_type", value="nope"), ["config.json"]),
    "unknown activation": ("full", "config.json", key("text_config", "hidden_act", value="nope"), ["config.json"]),
    "dtype unknown": ("full", "config.json", key("dtype", value="banana"), ["banana"]),
    "dtype a number": ("full", "config.json", key("dtype", value=32), ["dtype"]),
    "config.json a folder": ("full", "config.json", folder, ["config.json"]),
    "config.json a FIFO": ("full", "config.json", fifo, ["config.json"]),
    "config.json gone": ("full", "config.json", gone, ["config.json"]),
    "options a list": ("full", "vlm2vec.json", key("options", value=[]), ["vlm2vec.json", "options"]),
    "options a number": ("full", "vlm2vec.json", key("options", value=7), ["vlm2vec.json", "options"]),
    "unknown option": ("full", "vlm2vec.json", key("options", "crops", value=3), ["crops"]),
    "option null": ("full", "vlm2vec.json", key("options", "max_pixels", value=None), ["max_pixels"]),
    "option absurd": ("full", "vlm2vec.json", key("options", "min_pixels", value=10**30), ["min_pixels"]),
    "prompts a list": ("full", "vlm2vec.json", key("prompts", value=["Find: "]), ["vlm2vec.json", "prompts"]),
    "a prompt that is no text": ("full", "vlm2vec.json", key("prompts", value={"query": 5}), ["vlm2vec.json", "prompts"]),
    "family a number": ("full", "vlm2vec.json", key("family", value=5), ["family"]),
    "family a list": ("full", "vlm2vec.json", key("family", value=[]), ["family"]),
    "no tokenizer model": ("full", "tokenizer.json", without("model"), ["tokenizer.json"]),
    "vocabulary a list": ("full", "tokenizer.json", key("model", "vocab", value=[1, 2]), ["tokenizer.json"]),
    "unknown normalizer": ("full", "tokenizer.json", key("normalizer", value={"type": "Nope"}), ["tokenizer.json"]),
    "tokenizer.json a folder": ("full", "tokenizer.json", folder, ["tokenizer"]),
    "tokenizer.json a FIFO": ("full", "tokenizer.json", fifo, ["tokenizer.json"]),
    "tokenizer class a number": ("full", "tokenizer_config.json", key("tokenizer_class", value=5), ["token"]),
    "image mean of two": ("full", "processor_config.json", key("image_processor", "image_mean", value=[0.5, 0.5]), ["image_mean"]),
    "image mean a text": ("full", "processor_config.json", key("image_processor", "image_mean", value="grey"), ["image_mean"]),
    "image std 0": ("full", "processor_config.json", key("image_processor", "image_std", value=[0, 0, 0]), ["image_std"]),
    "rescale null": ("full", "processor_config.json", key("image_processor", "rescale_factor", value=None), ["rescale_factor"]),
    "rescale a text": ("full", "processor_config.json", key("image_processor", "rescale_factor", value="1/255"), ["rescale_factor"]),
    "image processor a list": ("full", "processor_config.json", key("image_processor", value=[]), ["processor"]),
    "weights cut": ("full", "model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-100]), ["weights cannot be loaded"]),
    "weights empty": ("full", "model.safetensors", raw(b""), ["weights cannot be loaded"]),
    "weights of zeros": ("full", "model.safetensors", raw(bytes(1000)), ["weights cannot be loaded"]),
    "weights with a vast header": ("full", "model.safetensors", raw(b"\xff" * 8 + b"{}"), ["weights cannot be loaded"]),
    "weights a folder": ("full", "model.safetensors", folder, ["model.safetensors"]),
    "weights a FIFO": ("full", "model.safetensors", fifo, ["model.safetensors"]),
    "weights gone": ("full", "model.safetensors", gone, ["weights"]),
    "a weight lacks": ("full", "model.safetensors", tensors(lambda t: t.pop(sorted(t)[3])), ["lacks"]),
    "a weight too many": ("full", "model.safetensors", tensors(lambda t: t.update(more=torch.ones(1))), ["no place", "more"]),
    "adapter of another kind": ("adapter", "adapter_config.json", key("peft_type", value="IA3"), ["IA3"]),
    "adapter rank null": ("adapter", "adapter_config.json", key("r", value=None), ["adapter_config.json"]),
    "adapter rank 0": ("adapter", "adapter_config.json", key("r", value=0), ["adapter_config.json"]),
    "adapter rank a text": ("adapter", "adapter_config.json", key("r", value="four"), ["adapter_config.json"]),
    "adapter alpha a text": ("adapter", "adapter_config.json", key("lora_alpha", value="x"), ["adapter_config.json"]),
    "adapter base a number": ("adapter", "adapter_config.json", key("base_model_name_or_path", value=5), ["base_model_name_or_path"]),
    "adapter base null": ("adapter", "adapter_config.json", key("base_model_name_or_path", value=None), ["base"]),
    "adapter base itself": ("adapter", "adapter_config.json", key("base_model_name_or_path", value="."), ["base"]),
    "adapter revision a number": ("adapter", "adapter_config.json", key("revision", value=5), ["revision"]),
    "adapter patterns a list": ("adapter", "adapter_config.json", key("rank_pattern", value=[1]), ["rank_pattern"]),
    "adapter weights cut": ("adapter", "adapter_model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9]), ["adapter_model"]),
    "adapter weights gone": ("adapter", "adapter_model.safetensors", gone, ["adapter_model.safetensors"]),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CASES)
def test_a_changed_folder(places, tmp_path, capsys, case):
    kind, name, change, named = CASES[case]
    model = tmp_path / "model"
    shutil.copytree(places / kind, model)
    change(model / name)
    assert_refused(capsys, ["embed", model, "--text", "a", "-o", tmp_path / "out.safetensors", "--device", "cpu"], *named)


def index(content):
    def change(model):
        (model / "model.safetensors").unlink()
        (model / "model.safetensors.index.json").write_text(content if isinstance(content, str) else json.dumps(content))

    return change


def as_bin(write):
    def change(model):
        weights = load_file(model / "model.safetensors")
        (model / "model.safetensors").unlink()
        write(model / "pytorch_model.bin", weights)

    return change


INDEXES = {
    "index a list": index([]),
    "index without a map": index({"metadata": {}}),
    "index deep": index(DEEP),
    "map of numbers": index({"weight_map": {"a": 5}}),
    "map to a file elsewhere": index({"metadata": {}, "weight_map": {"a": "../../../etc/passwd"}}),
    "map to what is not there": index({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", INDEXES)
def test_an_index_of_shards(places, tmp_path, capsys, case):
    model = tmp_path / "model"
    shutil.copytree(places / "full", model)
    INDEXES[case](model)
    assert_refused(
        capsys, ["embed", model, "--text", "a", "-o", tmp_path / "out.safetensors", "--device", "cpu"], "model.safetensors.index.json"
    )


PICKLES = {
    "pytorch_model.bin of tensors": as_bin(lambda path, weights: torch.save(weights, path)),
    "pytorch_model.bin of an old torch": as_bin(lambda path, weights: torch.save(weights, path, _use_new_zipfile_serialization=False)),
    "pytorch_model.bin with code": as_bin(lambda path, weights: path.write_bytes(pickle.dumps({"weight": Evil()}))),
    "pytorch_model.bin torch.save with code": as_bin(lambda path, weights: torch.save({"weight": Evil()}, path)),
    "model.bin": as_bin(lambda path, weights: torch.save(weights, path.with_name("model.bin"))),
}
UNSAFE = ("weights_only=False", "weights_only=", "trust_remote_code", "upgrade torch", "allow_pickle", "safe_globals")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", PICKLES)
def test_pickled_weights_are_refused_without_the_advice_to_load_them_unsafely(places, tmp_path, capsys, case):
    model = tmp_path / "model"
    shutil.copytree(places / "full", model)
    PICKLES[case](model)
    words = ["embed", model, "--text", "a", "-o", tmp_path / "out.safetensors", "--device", "cpu"]
    assert_refused(capsys, words, ".bin", "safetensors")
    assert not os.path.exists("/tmp/unpickled-by-a-test")


@pytest.mark.parametrize("write", [lambda p: torch.save({"a": Evil()}, p), lambda p: p.write_bytes(pickle.dumps(Evil()))])
def test_a_pickled_adapter_is_refused_without_that_advice(places, tmp_path, capsys, write):
    model = tmp_path / "model"
    shutil.copytree(places / "adapter", model)
    (model / "adapter_model.safetensors").unlink()
    write(model / "adapter_model.bin")
    assert_refused(capsys, ["info", model], "adapter_model.bin", "safetensors")
    words = ["embed", model, "--text", "a", "-o", tmp_path / "out.safetensors", "--device", "cpu"]
    assert_refused(capsys, words, "adapter_model.bin", "safetensors")
    assert not os.path.exists("/tmp/unpickled-by-a-test")


def test_an_adapter_of_plain_tensors_in_a_bin_file_is_read(places, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(places / "adapter", model)
    torch.save(load_file(model / "adapter_model.safetensors"), model / "adapter_model.bin")
    (model / "adapter_model.safetensors").unlink()
    assert_runs(capsys, ["embed", model, "--text", "a", "-o", tmp_path / "out.safetensors", "--device", "cpu"])
