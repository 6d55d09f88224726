"""What `vision_tower` names is all that `vision` computes with: freezing it makes the vision features constants."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_models import BUILDERS
from vlm2vec.model import VLM2Vec


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_frozen_vision_features_are_constants(family, tmp_path):
    BUILDERS[family](tmp_path)
    model = VLM2Vec.from_pretrained(tmp_path, dtype="float32").train()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    packed = model.pack(model.preprocess([{"image": Image.fromarray(pixels)}]))
    features = model.vision(packed)
    if not isinstance(features, torch.Tensor):
        pytest.skip("this family runs its tower inside the module")
    features.square().sum().backward()
    side = model.backbone.vision_tower(model.model)
    named = {id(p) for p in side.parameters()}
    reached = {n: p for n, p in model.model.named_parameters() if p.grad is not None}
    assert reached and all(id(p) in named for p in reached.values()), [n for n, p in reached.items() if id(p) not in named]
    assert not any(id(p) in named for p in model.backbone.text_model(model.model).get_input_embeddings().parameters())
    side.requires_grad_(False)
    assert not model.vision(packed).requires_grad
    assert model(packed).requires_grad
