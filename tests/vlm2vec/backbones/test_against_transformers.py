"""Packed embeddings against transformers' own model, padded, with its own attention: nothing of ours but ids, positions, pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tests.helpers.tiny_generic import BUILDERS as GENERIC
from tests.helpers.tiny_models import BUILDERS
from vlm2vec.model import VLM2Vec

SAME = 5e-6  # two implementations of the same arithmetic in float32
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")


def noise(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Two images with a text before each, a text row, an image wide enough for two windows of Qwen2.5-VL's tower, a short row.
INPUTS = [
    {"text": "before <|image_1|> between <|image_2|> behind", "images": [noise(60, 120, 1), noise(140, 90, 2)]},
    "a photo of a cat",
    {"text": "<|image_1|>\nRepresent the given image.\n", "image": noise(260, 70, 3)},
    "a",
    {"image": noise(20, 30, 4)},
]


def padded(features, packed, side: str) -> dict:
    length = max(f.length for f in features)
    ids = torch.zeros(len(features), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    axes = () if packed.position_ids.dim() == 1 else (3,)
    positions = torch.zeros(*axes, *ids.shape, dtype=torch.long)
    starts = packed.cu_seqlens.tolist()
    for i, f in enumerate(features):
        real = slice(length - f.length, length) if side == "left" else slice(0, f.length)
        ids[i, real], mask[i, real] = f.input_ids, 1
        positions[..., i, real] = packed.position_ids[..., starts[i] : starts[i + 1]]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def last_hidden(stock, family, features, packed, side):
    inputs = padded(features, packed, side)
    if family in QWEN:
        if inputs["position_ids"].dim() == 2:  # 1-D positions: the three axes alike
            inputs["position_ids"] = inputs["position_ids"].expand(3, -1, -1)
        inputs["pixel_values"] = torch.cat([f.vision["pixel_values"] for f in features if f.vision])
        inputs["image_grid_thw"] = torch.cat([f.vision["grid_thw"] for f in features if f.vision])
    else:
        inputs["pixel_values"] = torch.cat([f.vision["pixel_values"] for f in features if f.vision])
        inputs["image_sizes"] = torch.tensor([s for f in features if f.vision for s in f.vision["image_sizes"]])
    with torch.no_grad():
        hidden = stock(**inputs).last_hidden_state
    rows = torch.arange(len(features))
    last = torch.full_like(rows, -1) if side == "left" else torch.tensor([f.length - 1 for f in features])
    return torch.nn.functional.normalize(hidden[rows, last], dim=-1)


@pytest.mark.parametrize("family", [*QWEN, "llava_next"])
def test_padded_stock_model(family, tmp_path):
    BUILDERS[family](tmp_path)
    stock = AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    for positions in ("sequential", "mrope") if family in QWEN else (None,):
        options = {} if positions is None else {"positions": positions}
        model = VLM2Vec.from_pretrained(tmp_path, dtype="float32", **options)
        features = model.preprocess(INPUTS)
        packed = model.pack(features)
        with torch.no_grad():
            ours = torch.nn.functional.normalize(model(packed), dim=-1)
        for side in ("left", "right"):
            theirs = last_hidden(stock, family, features, packed, side)
            torch.testing.assert_close(ours, theirs, atol=SAME, rtol=0, msg=lambda m: f"{positions}, {side}: {m}")
            # `model.model` is still transformers' module: called its own way, it must not mix images up
            direct = last_hidden(model.model, family, features, packed, side)
            torch.testing.assert_close(direct, theirs, atol=SAME, rtol=0, msg=lambda m: f"called directly, {positions}, {side}: {m}")


@pytest.mark.parametrize("family", QWEN)
def test_mrope_positions_are_the_models_own(family, tmp_path):
    """Where the positions are asked to be the model's, transformers must compute the same from ids and grids."""
    BUILDERS[family](tmp_path)
    stock = AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    model = VLM2Vec.from_pretrained(tmp_path, dtype="float32", positions="mrope")
    for x in INPUTS:
        features = model.processing(x)
        packed = model.pack([features])
        if not features.vision:
            assert torch.equal(packed.position_ids.expand(3, -1)[0], torch.arange(features.length))
            continue
        kinds = torch.zeros(1, features.length, dtype=torch.int)
        kinds[0, features.visual_index] = 1
        want, _ = stock.get_rope_index(
            features.input_ids[None],
            mm_token_type_ids=kinds,
            image_grid_thw=features.vision["grid_thw"],
            attention_mask=torch.ones_like(features.input_ids[None]),
        )
        assert torch.equal(packed.position_ids, want[:, 0])


@pytest.mark.parametrize("family", sorted(GENERIC))
def test_generic_path_is_the_librarys_own_forward(family, tmp_path):
    """Processor and model as transformers loads them, one input at a time, against our padded groups."""
    GENERIC[family](tmp_path)
    stock = AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    model = VLM2Vec.from_pretrained(tmp_path, dtype="float32")
    marker = getattr(processor, "boi_token", None) or processor.image_token
    rows = []
    for x in INPUTS:
        x = {"text": x} if isinstance(x, str) else x
        images = x.get("images") or ([x["image"]] if "image" in x else None)
        text = x.get("text", "<|image_1|>").replace("<|image_1|>", marker).replace("<|image_2|>", marker)
        inputs = processor(text=[text], images=None if images is None else [images], return_tensors="pt")
        with torch.no_grad():
            rows.append(stock(**inputs).last_hidden_state[0, -1])
    theirs = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
    ours = model.encode(INPUTS, convert_to_tensor=True)
    torch.testing.assert_close(ours, theirs, atol=SAME, rtol=0)
