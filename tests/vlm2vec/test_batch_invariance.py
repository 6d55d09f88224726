"""An embedding is the same alone and in any company: every order, chunk size and neighbour, packed or padded, every family."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.padded_by_hand import padded_rows
from tests.helpers.tiny_generic import BUILDERS as GENERIC
from tests.helpers.tiny_models import BUILDERS as NAMED
from vlm2vec import encoding
from vlm2vec.backbones import FAMILIES
from vlm2vec.model import VLM2Vec

SAME = 1e-6
BUILDERS = {**NAMED, **GENERIC}


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# One token; texts near and far from each other's length, one beyond the tiny Phi's original context of 64; images that are
# wide, tall, tiny and of several tiles or crops; text behind, around and between images; two rows that are alike.
INPUTS = [
    "a",
    "a photo of a cat",
    {"image": noise(90, 70)},
    "the museum opened in 1932 and holds paintings, while an old man reads his newspaper in the sun near a river",
    {"text": "<|image_1|>\nRepresent the given image.\n", "image": noise(200, 40, 1)},
    {"text": "before <|image_1|> between <|image_2|> behind", "images": [noise(31, 120, 2), noise(56, 56, 3)]},
    {"text": "what?", "image": noise(20, 17, 4)},
    "a photo of a cat",
    {"text": "<|image_1|>\nRepresent the given image.\n", "image": noise(75, 101, 5)},
    "a photo of a dog",
]


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    BUILDERS[request.param](folder)
    return VLM2Vec.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def alone(model):
    rows = np.stack([model.encode(x) for x in INPUTS])
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, 0)
    cosine[1, 7] = cosine[7, 1] = 0  # the two that are alike
    assert cosine.max() < 0.9999, "the inputs must give different embeddings, or nothing is tested"
    return rows


def test_every_registered_family_is_here():
    assert set(FAMILIES) == set(NAMED)


def test_any_order_and_chunk_size(model, alone, monkeypatch):
    rng = random.Random(11)
    for batch_size, budget in ((32, None), (1, None), (2, None), (3, None), (32, 64), (5, 200)):
        order = list(range(len(INPUTS)))
        rng.shuffle(order)
        if budget is not None:
            monkeypatch.setitem(encoding.MAX_CHUNK_TOKENS, "cpu", budget)
        rows = model.encode([INPUTS[i] for i in order], batch_size=batch_size)
        np.testing.assert_allclose(rows, alone[order], atol=SAME, rtol=0, err_msg=f"batch_size {batch_size}, budget {budget}")


def test_packed_in_the_callers_order(model, alone):
    """`forward` itself, without `encode`'s sorting: short and long, with and without images, alternate."""
    for order in (range(len(INPUTS)), reversed(range(len(INPUTS))), [0, 5, 0, 3, 0], [2, 2, 2]):
        order = list(order)
        with torch.no_grad():
            hidden = model(model.pack(model.preprocess([INPUTS[i] for i in order])))
        rows = torch.nn.functional.normalize(hidden, dim=-1).numpy()
        np.testing.assert_allclose(rows, alone[order], atol=SAME, rtol=0)


def test_loud_neighbours_are_not_heard(model, alone):
    """Neighbours whose vision features are a thousand times too large change nothing, in front or behind."""
    features = model.preprocess([INPUTS[2], INPUTS[1], INPUTS[4]])
    packed = model.pack(features)
    with torch.no_grad():
        vision = model.vision(packed)
        if not isinstance(vision, torch.Tensor):
            pytest.skip("this family hands its vision features on in another form")
        hidden = model(packed, vision_features=vision * 1000)
    row = torch.nn.functional.normalize(hidden[1], dim=-1).numpy()
    np.testing.assert_allclose(row, alone[1], atol=SAME, rtol=0)


def test_no_gradient_crosses_a_sample(model):
    """The gradient of one sample's embedding is exactly zero in every other sample's pixels and tokens."""
    features = model.preprocess([INPUTS[i] for i in (2, 1, 4, 8)])
    pixels = []
    for f in features:
        for key, value in f.vision.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                f.vision[key] = value.clone().requires_grad_()
                pixels.append((len(pixels), f, f.vision[key]))
    embed, kept = model.backbone.embed, []

    def capture(*args, **kwargs):
        embeds = embed(*args, **kwargs)
        embeds.retain_grad()
        kept.append(embeds)
        return embeds

    packed = model.pack(features)
    try:
        model.backbone.embed = capture
        hidden = model(packed)
    finally:
        del model.backbone.embed
    row = 2
    hidden[row].sum().backward()
    model.zero_grad()
    for f in features:
        for value in f.vision.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                heard = value.grad is not None and bool(value.grad.abs().max() > 0)
                assert heard == (f is features[row])
    if kept and kept[0].dim() == 2 and model.backbone.packs:
        start, stop = packed.cu_seqlens[row].item(), packed.cu_seqlens[row + 1].item()
        gradient = kept[0].grad
        assert not gradient[:start].any() and not gradient[stop:].any()
        assert gradient[start:stop].abs().amax(dim=-1).gt(0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_through_the_same_layers(model, alone, side):
    """Rows padded by hand, with a 2-D mask and the library's own mask making, give the packed embeddings."""
    if not model.backbone.packs:
        pytest.skip("this family is always padded")
    hidden = padded_rows(model, INPUTS, side)
    if hidden is None:
        pytest.skip("this family feeds its layers more than embeddings; the padded path is transformers' own")
    rows = torch.nn.functional.normalize(hidden, dim=-1).numpy()
    np.testing.assert_allclose(rows, alone, atol=SAME, rtol=0)


def test_a_video_beside_images(model):
    if model.processing.video_marker is None:
        pytest.skip("this family takes no videos")
    frames = [noise(64, 48, 20 + i) for i in range(5)]  # an odd number: the last frame is repeated to fill a pair
    rows = [{"text": "<|video_1|> Represent the given video.", "video": frames}, INPUTS[4], INPUTS[0], {"video": frames[:2]}]
    single = np.stack([model.encode(x) for x in rows])
    np.testing.assert_allclose(model.encode(rows), single, atol=SAME, rtol=0)
    np.testing.assert_allclose(model.encode(rows[::-1]), single[::-1], atol=SAME, rtol=0)
    assert np.abs(single[0] - single[3]).max() > 1e-4
