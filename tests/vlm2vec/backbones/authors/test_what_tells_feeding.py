"""What tells that a model is fed as its authors feed it: the caller, vlm2vec.json, names, files, a token; and what is refused."""

import numpy as np
import pytest

from tests.helpers.tiny_embedders import FAMILIES
from tests.helpers.tiny_models import qwen2_vl, qwen3_vl
from vlm2vec.backbones import AUTHORS, backbone_for, processing_for
from vlm2vec.model import VLM2Vec


def feeding_of(folder, **options):
    return VLM2Vec.from_pretrained(folder, **options).options["feeding"]


def test_names_files_and_tokens_tell_it(tmp_path):
    (tmp_path / "base").mkdir()
    qwen3_vl(tmp_path / "base")
    assert feeding_of(tmp_path / "base") == "raw" and feeding_of(tmp_path / "base", feeding="authors") == "authors"
    (tmp_path / "base/modules.json").write_text('[{"idx": 0, "type": "vlm2vec.st.VLM2VecModule"}]')
    assert feeding_of(tmp_path / "base") == "raw"
    (tmp_path / "base/modules.json").write_text('[{"idx": 0, "type": "sentence_transformers.base.modules.transformer.Transformer"}]')
    assert feeding_of(tmp_path / "base") == "authors"
    (tmp_path / "base/vlm2vec.json").write_text('{"family": "qwen3_vl", "options": {"min_pixels": 4096}}')
    assert feeding_of(tmp_path / "base") == "raw", "what VLM2Vec trained and saved is fed as it was trained"
    (tmp_path / "base").rename(tmp_path / "Qwen3-VL-Embedding-2B")
    assert feeding_of(tmp_path / "Qwen3-VL-Embedding-2B") == "raw"
    (tmp_path / "Qwen3-VL-Embedding-2B/vlm2vec.json").unlink()
    (tmp_path / "Qwen3-VL-Embedding-2B/modules.json").unlink()
    assert feeding_of(tmp_path / "Qwen3-VL-Embedding-2B") == "authors"


def test_options_of_the_other_feeding_are_not_carried_over(folders, tmp_path):
    VLM2Vec.from_pretrained(folders / "qwen3_vl_embedding", max_pixels=40960).save_pretrained(tmp_path)
    assert VLM2Vec.from_pretrained(tmp_path).options["max_pixels"] == 40960
    raw = VLM2Vec.from_pretrained(tmp_path, feeding="raw")
    assert raw.options["max_pixels"] == 16384 * 32**2 and raw.options["max_length"] is None


def test_an_adapter_is_fed_as_its_base(folders, tmp_path):
    model = VLM2Vec.from_pretrained(folders / "wemm")
    model.add_adapter(r=2)
    model.save_pretrained(tmp_path)
    (tmp_path / "vlm2vec.json").unlink()
    again = VLM2Vec.from_pretrained(tmp_path)
    assert again.options["feeding"] == "authors" and again.family == model.family
    np.testing.assert_allclose(again.encode("a"), model.encode("a"), atol=1e-6)


def test_families_without_an_embedder_of_that_kind_refuse_it(tmp_path):
    qwen2_vl(tmp_path)
    for feeding, said in (
        ("authors", "feeding='authors' of family qwen2_vl: expected one of qwen3_vl, qwen3_5"),
        ("bare", "feeding='bare': expected 'raw' or 'authors'"),
    ):
        with pytest.raises(ValueError, match=said):
            VLM2Vec.from_pretrained(tmp_path, feeding=feeding)


def test_a_plain_base_is_not_taken_for_its_embedder(tmp_path):
    FAMILIES["qwen3_5"](tmp_path)
    assert feeding_of(tmp_path) == "raw"
    with pytest.raises(ValueError, match="puts <embedding> behind every text"):
        VLM2Vec.from_pretrained(tmp_path, feeding="authors")


@pytest.mark.parametrize("family", AUTHORS)
def test_what_the_template_is_for_is_not_switched_off(folders, family):
    name = {"qwen3_vl": "qwen3_vl_embedding", "qwen3_5": "wemm"}[family]
    assert processing_for(backbone_for(family), "authors").feeding == "authors"
    for option in ({"chat_template": False}, {"append_eos": True}, {"resolution": "high"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.*: expected .* with feeding='authors'"):
            VLM2Vec.from_pretrained(folders / name, **option)
