"""A model pickles: copies, spawned processes, sentence-transformers' pools and what LangChain starts."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_generic import BUILDERS as GENERIC
from tests.helpers.tiny_models import BUILDERS
from vlm2vec import VLM2Vec

FAMILIES = {**BUILDERS, **GENERIC}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
INPUTS = ["a fox", PICTURE, {"text": "what?", "image": PICTURE}, "a photo of a red fox in the snow"]


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


COPIES = {"pickle": through_pickle, "deepcopy": copy.deepcopy, "pickled twice": lambda model: through_pickle(through_pickle(model))}
STATES = {
    "as loaded": lambda model: None,
    "with an adapter": lambda model: model.add_adapter(r=2, alpha=4),
    "with gradient checkpointing": lambda model: model.gradient_checkpointing_enable(),
    "used": lambda model: model.encode(INPUTS),
}


def same_model(copied, model):
    assert type(copied) is VLM2Vec and copied.options == model.options and copied.prompts == model.prompts
    ours, theirs = model.state_dict(), copied.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {n: type(m).__name__ for n, m in model.named_modules()} == {n: type(m).__name__ for n, m in copied.named_modules()}
    # weights of a mapped file lie at other addresses than copies do, by which a CPU's products differ in their last bits
    np.testing.assert_allclose(copied.encode(INPUTS), model.encode(INPUTS), atol=1e-6)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family, how, folders):
    model = VLM2Vec.from_pretrained(folders(family))
    same_model(COPIES[how](model), model)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "qwen3_5"])  # modules with methods of ours
def test_every_state(family, state, folders):
    model = VLM2Vec.from_pretrained(folders(family))
    STATES[state](model)
    same_model(through_pickle(model), model)


def test_four_bits(folders):
    pytest.importorskip("bitsandbytes")
    model = VLM2Vec.from_pretrained(folders("qwen2_vl"), quantize="nf4", dtype="float32", device="cpu")
    np.testing.assert_allclose(through_pickle(model).encode(INPUTS), model.encode(INPUTS), atol=1e-6)


def test_a_copy_trains_by_itself(folders):
    """A copy's override runs on the copy's weights, gradients included."""
    model = VLM2Vec.from_pretrained(folders("qwen2_vl"))
    copied = through_pickle(model)
    copied(copied.pack(copied.preprocess([PICTURE]))).sum().backward()
    grad = copied.model.visual.patch_embed.proj.weight.grad
    assert grad.abs().max() > 0 and model.model.visual.patch_embed.proj.weight.grad is None


def _encode_in_child(queue, model, inputs):
    torch.set_num_threads(1)
    queue.put(model.encode(inputs))


def test_a_spawned_process(folders):
    model = VLM2Vec.from_pretrained(folders("qwen3_vl"))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_encode_in_child, args=(queue, model, INPUTS))
    child.start()
    rows = queue.get(timeout=120)
    child.join(60)
    assert child.exitcode == 0
    np.testing.assert_allclose(rows, model.encode(INPUTS), atol=1e-6)


def test_sentence_transformers_pool(folders):
    """`encode(device=[...])` starts a pool of spawned processes, each with the model."""
    pytest.importorskip("sentence_transformers")
    model = VLM2Vec.from_pretrained(folders("qwen2_vl"))
    rows = model.to_sentence_transformer().encode(INPUTS, device=["cpu"], chunk_size=2)
    np.testing.assert_allclose(rows, model.encode(INPUTS), atol=1e-6)


def test_langchain_multi_process(folders, tmp_path, monkeypatch):
    langchain = pytest.importorskip("langchain_huggingface")
    from sentence_transformers import SentenceTransformer

    model = VLM2Vec.from_pretrained(folders("qwen2_vl"))
    model.save_pretrained(tmp_path)
    texts = ["a fox", "a photo of a red fox", "snow"]
    # one process instead of a CPU's default, four, which import torch for a minute
    start = SentenceTransformer.start_multi_process_pool
    monkeypatch.setattr(SentenceTransformer, "start_multi_process_pool", lambda self: start(self, ["cpu"]))
    embeddings = langchain.HuggingFaceEmbeddings(
        model_name=str(tmp_path), model_kwargs={"device": "cpu", "trust_remote_code": True}, multi_process=True
    )
    np.testing.assert_allclose(embeddings.embed_documents(texts), model.encode(texts), atol=1e-6)
    np.testing.assert_allclose(embeddings.embed_query(texts[0]), model.encode(texts[0]), atol=1e-6)
