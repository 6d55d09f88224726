"""Every family's parameters belong to one part of three: the decoder, the vision tower, or what leads from one to the other."""

import pytest

from tests.helpers import tiny_models
from tests.helpers.tiny_generic import gemma3, smolvlm
from vlm2vec.model import VLM2Vec

FAMILIES = {**tiny_models.BUILDERS, "gemma3": gemma3, "smolvlm": smolvlm}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_all_parameters_once(family, tmp_path):
    FAMILIES[family](tmp_path)
    model = VLM2Vec.from_pretrained(tmp_path, device="cpu")
    parts = model.backbone.parts(model.model)
    names = [name for part in parts.values() for name in part]
    assert sorted(names) == sorted(name for name, _ in model.model.named_parameters()) and all(parts.values())
    text = {id(p) for p in model.backbone.text_model(model.model).parameters()}
    by_name = dict(model.model.named_parameters())
    if family != "phi3_v":  # its decoder is the module itself
        assert {id(by_name[name]) for name in parts["language"]} == text
    assert all("layers" not in name and "blocks" not in name for name in parts["projector"])
