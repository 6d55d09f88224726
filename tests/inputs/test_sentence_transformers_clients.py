"""What people do with the SentenceTransformer that a model becomes: train it, save it, cut it, feed it empty texts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_models import qwen2_vl
from vlm2vec import VLM2Vec
from vlm2vec.encoding import MAX_CHUNK_TOKENS

st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")

from sentence_transformers.sentence_transformer import losses

WORDS = ["red", "blue", "green", "small", "old", "wet", "tall", "kind"]
QUERIES = [f"find a {word} fox" for word in WORDS]
TARGETS = [f"a {word} fox" + " in the long grass" * (i % 3) for i, word in enumerate(WORDS)]
PICTURES = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 60 + 28 * i, 3), dtype=np.uint8)) for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    qwen2_vl(folder)
    return folder


@pytest.fixture
def wrapped(folder):
    return VLM2Vec.from_pretrained(folder, device="cpu").to_sentence_transformer()


LOSSES = {
    "MNRL": lambda model: losses.MultipleNegativesRankingLoss(model),
    "CachedMNRL": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
    "CachedMNRL by tokens": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=70),
    "Matryoshka": lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [32, 16, 8]),
    "Matryoshka of CachedMNRL": lambda model: losses.MatryoshkaLoss(
        model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3), [32, 16]
    ),
}
# what a loss must equal: the same one without a cache, written out with embeddings of our own
DIMS = {"Matryoshka": [32, 16, 8], "Matryoshka of CachedMNRL": [32, 16]}
COLUMNS = {
    "text": {"anchor": QUERIES, "positive": TARGETS},
    "text and pictures": {"anchor": QUERIES, "positive": PICTURES},
    "with hard negatives": {"anchor": QUERIES, "positive": PICTURES, "negative": TARGETS[::-1]},
}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model, columns, dims):
    """MNRL with scale 20 over prefixes: cross-entropy of cosines, from `VLM2Vec.forward` and nothing of sentence-transformers."""
    query, *targets = (model(model.pack(model.preprocess(values))).float() for values in columns.values())
    total = 0
    for dim in dims:
        q, t = (torch.nn.functional.normalize(x[:, :dim], dim=-1) for x in (query, torch.cat(targets)))
        total = total + torch.nn.functional.cross_entropy(20 * q @ t.T, torch.arange(len(q)))
    return total


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_the_right_gradients(name, columns, wrapped):
    model, columns = wrapped[0].vlm2vec, COLUMNS[columns]
    expected_loss = by_hand(model, columns, DIMS.get(name, [32]))
    expected = gradients(model, expected_loss)
    loss = LOSSES[name](wrapped)
    value = loss([wrapped.preprocess(values) for values in columns.values()], None)
    found = gradients(model, value)
    torch.testing.assert_close(value, expected_loss, atol=1e-5, rtol=1e-5)
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=2e-5 * expected[key].abs().max().item() + 1e-7, rtol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["MNRL", "CachedMNRL", "Matryoshka"])
def test_its_trainer_trains(name, checkpointing, wrapped, tmp_path):
    """Two steps by SentenceTransformerTrainer, saved checkpoints included, end in weights that learned; the best is loaded again."""
    data = datasets.Dataset.from_dict(
        COLUMNS["text and pictures"], features=datasets.Features({"anchor": datasets.Value("string"), "positive": datasets.Image()})
    )
    arguments = st.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=4,
        learning_rate=1e-3,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        gradient_checkpointing=checkpointing,
        report_to="none",
        prompts={"anchor": "Find: "},
        use_cpu=True,
    )
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    trainer = st.SentenceTransformerTrainer(wrapped, arguments, train_dataset=data, eval_dataset=data, loss=LOSSES[name](wrapped))
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first
    assert any(not torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())
    best = trainer.state.best_model_checkpoint
    rows = VLM2Vec.from_pretrained(best, device="cpu").encode(TARGETS)
    np.testing.assert_allclose(wrapped.encode(TARGETS), rows, atol=1e-6)
    if name == "MNRL" and not checkpointing:
        again = st.SentenceTransformerTrainer(wrapped, arguments, train_dataset=data, eval_dataset=data, loss=LOSSES[name](wrapped))
        assert again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).global_step == 4


@pytest.mark.parametrize("value", [1, 5, 512, None])
def test_max_seq_length_is_settable_and_saved(value, wrapped, tmp_path):
    model = wrapped[0].vlm2vec
    wrapped.max_seq_length = value
    assert wrapped.max_seq_length == (value or 4096), "the option, else the model's positions"
    length = len(model.preprocess(["a photo of a fox"])[0].input_ids)
    assert length == min(16, value or 16)
    wrapped.save_pretrained(str(tmp_path))
    assert VLM2Vec.from_pretrained(tmp_path).options["max_length"] == value


@pytest.mark.parametrize("value", [0, -1, 2.5, "512", True])
def test_max_seq_length_is_a_count(value, wrapped):
    with pytest.raises(ValueError, match=f"max_length={value!r}: expected an integer of at least 1, or None"):
        wrapped.max_seq_length = value


def test_a_batch_may_be_cut_shorter(wrapped):
    """The trainer's max_length: of this batch alone, and never longer than the model's."""
    wrapped.max_seq_length = 8
    for asked, got in ((5, 5), (100, 8), (None, 8)):
        assert wrapped.preprocess(["a photo of a fox"], max_length=asked)["input_ids"].shape == (1, got)
    assert wrapped.max_seq_length == 8


def test_saving_keeps_prompts_default_prompt_and_similarity(wrapped, tmp_path):
    wrapped.prompts = {"query": "Find: ", "document": "", "clustering": "Sort: "}
    wrapped.default_prompt_name = "clustering"
    wrapped.similarity_fn_name = "euclidean"
    wrapped.truncate_dim = 16
    rows = wrapped.encode(QUERIES)
    wrapped.save_pretrained(str(tmp_path))
    about = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert about["prompts"] == wrapped.prompts and about["default_prompt_name"] == "clustering"
    assert about["similarity_fn_name"] == "euclidean" and about["truncate_dim"] == 16
    loaded = st.SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert (loaded.prompts, loaded.default_prompt_name, loaded.similarity_fn_name) == (wrapped.prompts, "clustering", "euclidean")
    np.testing.assert_allclose(loaded.encode(QUERIES), rows, atol=1e-6)
    ours = VLM2Vec.from_pretrained(tmp_path, device="cpu")
    assert ours.prompts["query"] == "Find: " and ours.prompts["clustering"] == "Sort: "
    np.testing.assert_allclose(loaded.encode_query(QUERIES), ours.encode_query(QUERIES, truncate_dim=16), atol=1e-6)


@pytest.mark.parametrize("how", ["in memory", "loaded"])
def test_truncate_dim_normalises_after_the_cut(how, wrapped, tmp_path):
    model = wrapped[0].vlm2vec
    if how == "loaded":
        wrapped.save_pretrained(str(tmp_path))
        wrapped = st.SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    expected = model.encode(TARGETS, truncate_dim=8)
    np.testing.assert_allclose(wrapped.encode(TARGETS, truncate_dim=8), expected, atol=1e-6)
    np.testing.assert_allclose(wrapped.encode(TARGETS, truncate_dim=8, normalize_embeddings=True), expected, atol=1e-6)
    with wrapped.truncate_embeddings(8):
        np.testing.assert_allclose(wrapped.encode(TARGETS), expected, atol=1e-6)


EMPTY = {
    "an empty text": ["a fox", "", "snow"],
    "empty texts alone": ["", ""],
    "an empty text in a dict": ["a fox", {"text": ""}],
    "an empty text beside a picture": [{"text": "", "image": PICTURES[0]}, ""],
}


@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_text_does_not_stop_a_batch(kind, wrapped):
    """It is fed as the reference feeds a missing one, two spaces; the others are what they are without it."""
    model, inputs = wrapped[0].vlm2vec, EMPTY[kind]
    rows = wrapped.encode(inputs)
    expected = model.encode(["  " if x in ("", {"text": ""}) else x for x in inputs])
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    np.testing.assert_allclose(wrapped.encode("", prompt="Find: "), model.encode("Find: "), atol=1e-6)


def test_a_large_batch_is_cut_by_tokens(wrapped, monkeypatch):
    """Without gradients a batch runs in chunks of the device's budget, whatever its batch size; in training it runs whole."""
    model, runs = wrapped[0].vlm2vec, []
    monkeypatch.setitem(MAX_CHUNK_TOKENS, "cpu", 40)
    forward = VLM2Vec.forward
    monkeypatch.setattr(VLM2Vec, "forward", lambda self, packed: runs.append(sum(packed.seqlens)) or forward(self, packed))
    rows = wrapped.encode(TARGETS)
    assert max(runs) <= max(40, max(len(text) for text in TARGETS)) and len(runs) > 3
    np.testing.assert_allclose(rows, model.encode(TARGETS), atol=1e-6)
    runs.clear()
    wrapped.train()(wrapped.preprocess(TARGETS))
    assert len(runs) == 1


def test_llama_index(wrapped, tmp_path):
    llama = pytest.importorskip("llama_index.embeddings.huggingface")
    wrapped.save_pretrained(str(tmp_path))
    embedding = llama.HuggingFaceEmbedding(str(tmp_path), trust_remote_code=True, device="cpu")
    assert embedding.max_length == 4096
    rows = VLM2Vec.from_pretrained(tmp_path, device="cpu").encode(TARGETS)
    np.testing.assert_allclose(embedding.get_text_embedding_batch(TARGETS), rows, atol=1e-6)
