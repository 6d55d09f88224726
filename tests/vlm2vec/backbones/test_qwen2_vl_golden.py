"""Qwen2-VL against the reference implementation's own numbers: pixels, ids, embeddings, video, loss and gradients."""

import pytest
import torch

from contrastive_kernels import GradCache, info_nce
from tests.helpers.golden_files import read
from tests.helpers.versions import needs_pillow_13
from vlm2vec.backbones.pixels import smart_resize
from vlm2vec.model import VLM2Vec


@pytest.fixture(scope="module")
def qwen(golden):
    folder, cases, expected = read(golden, "qwen2_vl")
    items = [{"text": i["raw_text"], "image": str(folder / i["image"])} if i["image"] else i["raw_text"] for i in cases["items"]]
    videos = [
        {"text": i["reference_text"], "video": [str(folder / f) for f in i["frames"]]} if i["frames"] else i["reference_text"]
        for i in cases["video_batch"]["items"]
    ]
    return folder, cases, expected, items, videos


@pytest.fixture(scope="module")
def model(qwen):
    return VLM2Vec.from_pretrained(qwen[0])


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), atol=atol, rtol=0)


@needs_pillow_13
def test_ids_and_pixels_are_exact(qwen, model):
    _, cases, expected, items, videos = qwen
    for i, (features, case) in enumerate(zip(model.preprocess(items), cases["items"])):
        assert features.input_ids.tolist() == case["single_input_ids"]
        assert features.length == case["n_tokens"]
        if case["image"]:
            assert features.vision["grid_thw"].tolist() == case["image_grid_thw"]
            close(features.vision["pixel_values"], expected[f"pixel_values.{i}"], 1e-6)
    first = model.preprocess(videos)[0]
    assert first.input_ids.tolist() == cases["video_batch"]["single0_input_ids"]
    close(first.vision["pixel_values"], expected["video.pixel_values_videos.0"], 1e-6)


@needs_pillow_13
def test_embeddings_singly_batched_and_in_any_chunk(qwen, model):
    _, _, expected, items, _ = qwen
    close(model.encode(items), expected["embeddings"])
    close(torch.stack([model.encode(x, convert_to_tensor=True) for x in items]), expected["embeddings_single"])
    close(model.encode(items[::-1], batch_size=3)[::-1].copy(), expected["embeddings_other_padding_side"])
    with torch.no_grad():
        close(model(model.pack(model.preprocess(items))), expected["hidden_last_token_unnormalized"], 5e-5)  # norms of about 10


@needs_pillow_13
def test_vision_features(qwen, model):
    _, cases, expected, items, _ = qwen
    features = model.preprocess(items)
    with torch.no_grad():
        rows = model.vision(model.pack(features))
    theirs = torch.cat([expected[f"vision_output.{i}"] for i, c in enumerate(cases["items"]) if c["image"]])
    close(rows, theirs)


def test_videos(qwen, model):
    _, _, expected, _, videos = qwen
    close(model.encode(videos), expected["video.embeddings"])
    close(model.encode(videos[0]), expected["video.single0.embedding"][0])


def test_true_mrope_is_another_model(qwen):
    folder, _, expected, items, _ = qwen
    mrope = VLM2Vec.from_pretrained(folder, positions="mrope").encode(items, convert_to_tensor=True)
    cosine = (mrope * expected["embeddings"]).sum(-1)
    seen = torch.tensor([isinstance(x, dict) for x in items])
    assert cosine[seen].max() < 0.9999
    assert cosine[~seen].min() > 0.999999  # without images the positions are the same


def test_a_prompt_with_vision_start_is_sequential_too(qwen, model):
    folder, _, expected, _, _ = qwen
    text = "<|vision_start|><|image_pad|><|vision_end|>Represent the given image."
    row = model.encode({"text": text, "image": str(folder / "images/img_112x56.png")})
    close(row, expected["chat_style_later_call.embedding"][0])


def test_smart_resize_table(qwen):
    for height, width, low, high, (h, w) in qwen[1]["smart_resize_table"]["rows"]:
        got = smart_resize(height, width, factor=28, min_pixels=low, max_pixels=high)
        assert got == (max(h, 28), max(w, 28))  # the reference's zero sides cannot be resized to


@pytest.fixture(scope="module")
def pairs(golden):
    folder, cases, expected = read(golden, "loss_qwen2_vl")

    def side(rows):
        return [{"text": r["raw_text"], "image": str(folder / r["image"])} if r["image"] else r["raw_text"] for r in rows]

    return cases, expected, side(cases["queries"]), side(cases["targets"])


def same_gradients(model, cases, expected, way):
    names = dict(model.model.named_parameters())
    for name in cases["parameters"]:
        ours = names[name.replace("model.", "language_model.", 1) if name.startswith("model.") else name].grad
        theirs = expected[f"{way}.{name}"]
        assert (ours - theirs).norm() < 1e-5 * theirs.norm(), name


@needs_pillow_13
@pytest.mark.parametrize("cut", [{"chunk_size": 2}, {"chunk_tokens": 40, "retain": 1}], ids=str)
def test_gradcache_and_its_gradients(qwen, pairs, cut):
    """The reference's own chunks of two rows, and chunks by tokens with one graph kept: its chunked gradients."""
    cases, expected, queries, targets = pairs
    model = VLM2Vec.from_pretrained(qwen[0]).train()
    features = model.preprocess(queries), model.preprocess(targets)
    cache = GradCache(lambda side, rows: model(model.pack([side[r] for r in rows])), **cut)
    lengths = tuple([f.length for f in side] for side in features)
    result = cache.step(*features, lengths=lengths, temperature=cases["temperature"], normalize=True)
    assert abs(float(result.loss) - cases["loss"]["full_batch"]) < 1e-5 * cases["loss"]["full_batch"]
    same_gradients(model, cases, expected, "grad_gradcache_chunk2")


@needs_pillow_13
def test_loss_and_its_gradients(qwen, pairs):
    cases, expected, queries, targets = pairs
    model = VLM2Vec.from_pretrained(qwen[0]).train()
    q = model(model.pack(model.preprocess(queries)))
    t = model(model.pack(model.preprocess(targets)))
    q, t = (torch.nn.functional.normalize(x, dim=-1) for x in (q, t))
    q.retain_grad(), t.retain_grad()
    loss = info_nce(q, t, temperature=cases["temperature"])
    assert abs(loss.item() - cases["loss"]["full_batch"]) < 1e-5 * cases["loss"]["full_batch"]
    loss.backward()
    same_gradients(model, cases, expected, "grad_full_batch")
    for ours, name in ((q, "grad_query_embeddings"), (t, "grad_target_embeddings")):
        assert (ours.grad - expected[name]).norm() < 1e-5 * expected[name].norm()


def test_gradients_do_not_depend_on_chunks_or_checkpointing(qwen, pairs):
    """float64: one packed chunk, chunks of three, with recomputation, with the vision features handed in."""
    _, _, queries, _ = pairs
    model = VLM2Vec.from_pretrained(qwen[0], dtype="float64").train()
    features = model.preprocess(queries)

    def gradients(run):
        model.zero_grad()
        sum(h.square().sum() for h in run()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    whole = model.pack(features)
    truth = gradients(lambda: [model(whole)])
    assert all(g.dtype == torch.float64 for g in truth.values())
    model.gradient_checkpointing_enable()
    recomputed = gradients(lambda: [model(whole)])
    model.gradient_checkpointing_disable()
    others = (
        recomputed,
        gradients(lambda: [model(model.pack(features[i : i + 3])) for i in range(0, len(features), 3)]),
        gradients(lambda: [model(whole, vision_features=model.vision(whole))]),
    )
    for other in others:
        for name, g in truth.items():
            assert (g - other[name]).norm() <= 1e-10 * (g.norm() + 1e-10), name
