"""What the encoder shares between inputs changes no vector: pictures decoded once, alike beginnings, ends on last rows alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import tiny_models
from vlm2vec import VLM2Vec
from vlm2vec.evaluation.encode import encoder, prefixes
from vlm2vec.evaluation.encode.encoder import Encoder
from vlm2vec.evaluation.encode.keys import ContentHashes, visual_key

CLOSE = 2e-6  # float32 vectors of length 1, by the same arithmetic in another order


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(84, 56), (56, 112), (84, 56)]):  # two of one size: equal tokens, other pictures
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def inputs_of(pictures):
    """Pictures under several instructions, texts with a common head, equal heads of other lengths, films, and what shares nothing."""
    asks = ["<|image_1|>\nRepresent the given image.", "<|image_1|>\nRepresent the given image with the question: how many?", "a cat"]
    items = [{"text": ask, "image": str(pictures / f"{n}.png")} for n in range(3) for ask in asks]
    items += [{"text": f"Find a picture of this: {word}"} for word in ("a cat", "the dog on a mat", "x", "a cat in a hat")]
    items += [{"text": text} for text in ("cat", "Find", "Find a picture of this:")]
    late = {"image": str(pictures / "0.png")}  # alike before a picture that is not among what is shared
    items += [{"text": text, **late} for text in ("Represent this picture: <|image_1|>", "Represent this photo: <|image_1|> of a cat")]
    both = {"image": [str(pictures / "0.png"), str(pictures / "1.png")]}
    items += [{"text": f"<|image_1|> The other one is {word}: <|image_2|>", **both} for word in ("larger", "less large")]
    film = [str(pictures / f"{n}.png") for n in (0, 2, 0)]
    return items + [{"text": text, "video": film} for text in ("<|video_1|> What happens?", "<|video_1|> What happens here?")]


def encoded(model, items, **options):
    hashes = ContentHashes()
    with torch.inference_mode():
        (found,) = Encoder(model, workers=2, **options).run([items], [[visual_key(item, hashes) for item in items]])
    return found


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "phi3_v"])
@pytest.mark.parametrize("budget", [2048, 90])  # all in few chunks, and families cut over several
def test_vectors_are_those_of_encode(family, budget, pictures, tmp_path, monkeypatch):
    getattr(tiny_models, family)(tmp_path)
    monkeypatch.setitem(encoder.DECODER_TOKENS, "cpu", budget)
    monkeypatch.setitem(encoder.TOWER_TOKENS, "cpu", budget)
    model = VLM2Vec.from_pretrained(tmp_path, dtype="float32", device="cpu").eval()
    items = [item for item in inputs_of(pictures) if family != "phi3_v" or "video" not in item]
    good, vectors, failures = encoded(model, items)
    alone = torch.cat([model.encode([item], convert_to_tensor=True) for item in items])
    assert good == list(range(len(items))) and not failures
    assert (vectors - alone).abs().max() < CLOSE


def test_m_rope_positions_are_shared_too(pictures, tmp_path):
    tiny_models.qwen2_vl(tmp_path)
    model = VLM2Vec.from_pretrained(tmp_path, dtype="float32", device="cpu", positions="mrope").eval()
    items = inputs_of(pictures)
    alone = torch.cat([model.encode([item], convert_to_tensor=True) for item in items])
    assert (encoded(model, items)[1] - alone).abs().max() < CLOSE


def test_what_is_shared(pictures, tmp_path):
    """Media whole or not at all, never across pictures; fewer tokens than samples have."""
    tiny_models.qwen2_vl(tmp_path)
    model, hashes, items = VLM2Vec.from_pretrained(tmp_path, dtype="float32", device="cpu"), ContentHashes(), inputs_of(pictures)
    features, groups = model.preprocess(items), [visual_key(item, hashes) for item in items]
    found = prefixes.families(features, groups)
    assert sorted(row for family in found for row in family.rows) == list(range(len(items)))
    for family in found:
        first = features[family.rows[0]]
        assert {groups[row] for row in family.rows} == {groups[family.rows[0]]}
        assert all(torch.equal(features[row].input_ids[: family.shared], first.input_ids[: family.shared]) for row in family.rows)
        assert all(family.shared < length for length in family.lengths)
        if first.visual_index is not None and family.shared:
            assert int(first.visual_index[-1]) < family.shared
    assert sum(family.tokens for family in found) < 0.8 * sum(f.length for f in features)
    for chunk in prefixes.family_chunks(found, 200, 3):
        assert sum(len(family.rows) for family in chunk) <= 3
        assert sum(family.tokens for family in chunk) <= 200 or len(chunk) == len(chunk[0].rows) == 1


def test_a_picture_is_decoded_once(pictures, tmp_path, monkeypatch):
    tiny_models.qwen2_vl(tmp_path)
    model = VLM2Vec.from_pretrained(tmp_path, dtype="float32", device="cpu").eval()
    opened, open_one = [], type(model.processing).open
    monkeypatch.setattr(type(model.processing), "open", lambda self, image: opened.append(image) or open_one(self, image))
    encoded(model, [item for item in inputs_of(pictures) if isinstance(item.get("image"), str)])
    assert sorted(map(str, opened)) == [str(pictures / f"{n}.png") for n in range(3)]


def test_one_that_cannot_be_read_leaves_the_others(pictures, tmp_path):
    """Broken behind its header: measured, and found out when it is decoded."""
    tiny_models.qwen2_vl(tmp_path)
    model = VLM2Vec.from_pretrained(tmp_path, dtype="float32", device="cpu").eval()
    broken = tmp_path / "broken.png"
    broken.write_bytes((pictures / "0.png").read_bytes()[:600])
    items = inputs_of(pictures)[:4] + [{"text": text, "image": str(broken)} for text in ("<|image_1|>\na", "<|image_1|>\nb")]
    good, vectors, failures = encoded(model, items)
    assert good == [0, 1, 2, 3] and sorted(failures) == [4, 5] and all("broken.png" in reason for reason in failures.values())
    assert (vectors - model.encode(items[:4], convert_to_tensor=True)).abs().max() < CLOSE


def test_settings_and_kind_of_media_keep_inputs_apart(pictures):
    hashes, image = ContentHashes(), str(pictures / "0.png")
    keys = [visual_key(item, hashes) for item in ({"image": image}, {"video": [image]}, {"image": image, "max_pixels": 3136}, {})]
    assert len(set(keys)) == 4 and keys[3] == b""


def test_the_last_layer_runs_whole_where_somebody_looks(tmp_path):
    """Outside of inference mode, or with a hook on the layer, every token goes through it."""
    tiny_models.qwen2_vl(tmp_path)
    model = VLM2Vec.from_pretrained(tmp_path, dtype="float32", device="cpu").eval()
    packed, seen = model.pack(model.preprocess(["a cat", "a longer text"])), []
    layer = model.backbone.text_model(model.model).layers[-1]
    layer.mlp.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    with torch.no_grad():
        whole = model(packed)
    with torch.inference_mode():
        ends = model(packed)
        handle = layer.register_forward_hook(lambda *_: None)
        hooked = model(packed)
        handle.remove()
    tokens = sum(packed.seqlens)
    assert seen == [tokens, 2, tokens]
    assert (whole - ends).abs().max() < CLOSE * whole.abs().max() and torch.equal(whole, hooked)
