"""Qwen3.5 packed: gradients as alone, films placed as transformers places them, nothing carried from call to call."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from tests.helpers.tiny_models import qwen3_5
from vlm2vec.backbones import FAMILIES
from vlm2vec.model import VLM2Vec


def noise(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# One token, fewer than the convolution sees, beyond two chunks of the delta rule; pictures of several sizes.
INPUTS = [
    "a",
    "ab",
    "the museum opened in 1932 and holds paintings, " * 4,
    {"text": "before <|image_1|> between <|image_2|> behind", "images": [noise(64, 120, 1), noise(140, 90, 2)]},
    {"image": noise(300, 280, 3)},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("qwen3_5")
    qwen3_5(place)
    return place


def gradients(model, batches, cotangent):
    """Of the sum of the rows' products with their cotangents; `batches` names the rows of each forward pass."""
    model.zero_grad(set_to_none=True)
    features = model.preprocess(INPUTS)
    for rows in batches:
        hidden = model(model.pack([features[row] for row in rows]).to("cpu", model.dtype))
        (hidden * cotangent[list(rows)]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["full", "checkpointed", "lora"])
def test_gradients_are_those_of_samples_alone(folder, kind):
    model = VLM2Vec.from_pretrained(folder, dtype="float64").train()
    if kind == "lora":
        model.add_adapter(r=2, dora=True, targets="all-linear")
        assert any("linear_attn.in_proj_qkv.lora_A" in name for name, _ in model.named_parameters())
    if kind == "checkpointed":
        model.gradient_checkpointing_enable()
    cotangent = torch.randn(len(INPUTS), model.embedding_dim, dtype=torch.float64)
    packed = gradients(model, [range(len(INPUTS))], cotangent)
    model.gradient_checkpointing_disable()
    alone = gradients(model, [[row] for row in range(len(INPUTS))], cotangent)
    assert packed.keys() == alone.keys() and len(packed) > 10
    assert kind == "lora" or {name.rpartition("linear_attn.")[2] for name in packed if "linear_attn" in name} >= {"A_log", "dt_bias"}
    whole = sum(float(g.square().sum()) for g in alone.values()) ** 0.5
    for name, gradient in alone.items():
        assert gradient.dtype == torch.float64
        apart = float((packed[name] - gradient).norm())
        assert apart <= 1e-9 * max(float(gradient.norm()), 1e-6 * whole), f"{name}: {apart}"


@pytest.mark.parametrize("frames", [5, 1])
def test_films_stand_where_transformers_puts_them(folder, frames):
    """Time stamps before every time step, a row of the grid for each, and one pair of markers around it: ids, positions and vector."""
    model = VLM2Vec.from_pretrained(folder, dtype="float32", chat_template=True)
    stock = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    film = [noise(96, 64, 10 + i) for i in range(frames)]
    features = model.processing({"text": "<|video_1|>what happens?", "video": film, "instruction": "Look closely."})
    said = model.processing.tokenizer.decode(features.input_ids).replace("<|video_pad|>", "")
    stamps = {5: "<0.2 seconds>{0}<1.2 seconds>{0}<2.0 seconds>{0}", 1: "<0.0 seconds>{0}"}[frames].format("<|vision_start|><|vision_end|>")
    assert said == (
        f"<|im_start|>system\nLook closely.<|im_end|>\n<|im_start|>user\n{stamps}what happens?<|im_end|>\n<|im_start|>assistant\n"
    )
    kinds = torch.zeros(1, features.length, dtype=torch.int)
    kinds[0, features.visual_index] = 2
    inputs = {"input_ids": features.input_ids[None], "mm_token_type_ids": kinds, "video_grid_thw": features.vision["grid_thw"]}
    positions, _ = stock.get_rope_index(**inputs)
    assert torch.equal(features.position_ids, positions[:, 0])
    with torch.no_grad():
        theirs = stock(**inputs, pixel_values_videos=features.vision["pixel_values"]).last_hidden_state[0, -1]
        ours = model(model.pack([model.processing("b"), features, model.processing("c")]))[1]
    torch.testing.assert_close(*(torch.nn.functional.normalize(x, dim=-1) for x in (ours, theirs)), atol=5e-6, rtol=0)


def test_nothing_is_carried_from_call_to_call(folder):
    """transformers keeps the last call's `rope_deltas` on the module; a stale one shifts the positions of what comes next."""
    model = VLM2Vec.from_pretrained(folder, dtype="float32")
    rows = model.encode(INPUTS)
    assert model.model.rope_deltas is None
    model.model.rope_deltas = torch.full((1, 1), 1000)
    np.testing.assert_array_equal(model.encode(INPUTS), rows)


def test_a_template_is_never_cut(folder):
    """A text that is too long loses its end, and the closing on whose last token the embedding stands stays."""
    model = VLM2Vec.from_pretrained(folder, dtype="float32", chat_template=True, max_length=40)
    whole = model.processing("ab").input_ids
    with pytest.warns(UserWarning, match="cut to max_length=40"):
        cut = model.processing("ab" + "c" * 100).input_ids
    assert len(cut) == 40 and torch.equal(cut[-12:], whole[-12:])


def test_weights_of_the_second_token_are_left_out(folder, tmp_path):
    """Published checkpoints hold layers that predict a second token (`mtp.`): no part of an embedding."""
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    save_file({**load_file(file), "mtp.fc.weight": torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    ours, plain = (VLM2Vec.from_pretrained(place).encode("a fox") for place in (tmp_path / "model", folder))
    np.testing.assert_allclose(ours, plain, atol=1e-6)  # weights of another file lie at other addresses


def test_packed_is_what_the_generic_path_pads(folder, tmp_path, monkeypatch):
    """The library's processor and forward pass on rows padded to the right, where nothing is known of the layers' state."""
    model = VLM2Vec.from_pretrained(folder, dtype="float32")
    model.save_pretrained(tmp_path)
    (tmp_path / "vlm2vec.json").unlink()  # options that the generic path has not
    monkeypatch.delitem(FAMILIES, "qwen3_5")
    generic = VLM2Vec.from_pretrained(tmp_path, dtype="float32")
    assert generic.family == "generic" and not generic.backbone.packs
    inputs = [*INPUTS[:3], {"text": "<|image_1|>what?", "image": noise(256, 256, 4)}, {"image": noise(320, 256, 5)}]  # none is resized
    np.testing.assert_allclose(generic.encode(inputs), model.encode(inputs), atol=2e-6)
