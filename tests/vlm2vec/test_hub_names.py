"""Models named as on the hub: base, adapter on a base of the hub, revisions; and names that nothing answers to."""

import json
import shutil

import numpy as np
import pytest

from tests.helpers.tiny_models import phi3_v, qwen2_vl
from vlm2vec.checkpoint import loading
from vlm2vec.cli import main
from vlm2vec.model import VLM2Vec

HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache laid out as huggingface_hub lays it out; `hub(name, folder)` puts a folder there as the hub's model `name`."""
    import huggingface_hub.constants
    import huggingface_hub.file_download
    import transformers.utils.hub as transformers_hub

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE", "HF_HUB_CACHE"):
        if hasattr(transformers_hub.constants, name):
            monkeypatch.setattr(transformers_hub.constants, name, str(cache))

    def put(name, folder):
        place = cache / ("models--" + name.replace("/", "--"))
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(HASH)
        shutil.copytree(folder, place / "snapshots" / HASH)

    return put


@pytest.mark.parametrize("build", [qwen2_vl, phi3_v], ids=lambda b: b.__name__)
def test_a_base_and_an_adapter_of_the_hub(hub, tmp_path, build):
    (tmp_path / "base").mkdir()
    build(tmp_path / "base")
    hub("Some/Base-Model", tmp_path / "base")
    model = VLM2Vec.from_pretrained("Some/Base-Model")
    rows = model.encode(["a cat", "b"])
    np.testing.assert_array_equal(rows, VLM2Vec.from_pretrained(tmp_path / "base").encode(["a cat", "b"]))
    np.testing.assert_array_equal(VLM2Vec.from_pretrained("Some/Base-Model", revision=HASH).encode(["a cat", "b"]), rows)
    model.add_adapter(r=2, dora=True)
    model.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "Some/Base-Model"
    for file in ("tokenizer.json", "preprocessor_config.json", "processor_config.json", "vlm2vec.json"):
        (tmp_path / "adapter" / file).unlink(missing_ok=True)  # public adapters may hold nothing but the adapter
    hub("Some/Adapter", tmp_path / "adapter")
    np.testing.assert_allclose(VLM2Vec.from_pretrained("Some/Adapter").encode(["a cat", "b"]), rows, atol=1e-6)


def test_names_that_nothing_answers_to(hub, capsys):
    for name in ("Qwen/Qwen2-VL-2B-Instruct", "gpt2"):
        loading.check_source(name)  # a hub name is not taken for a folder that is missing
        with pytest.raises(ValueError, match="no such folder here, and the hub has no such model or cannot be reached"):
            VLM2Vec.from_pretrained(name)
        assert main(["info", name]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for path in ("./x/y", "/x", "a/b/c", "~/x"):
        with pytest.raises(ValueError, match="no such folder; give"):
            loading.check_source(path)
