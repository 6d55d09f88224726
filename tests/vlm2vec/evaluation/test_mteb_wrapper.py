"""The wrapper is mteb's encoder, and its instructions are those of the sides; tests/inputs/test_mteb_grid.py runs mteb's mock tasks."""

import numpy as np
import pytest
import torch

mteb = pytest.importorskip("mteb")

from vlm2vec.evaluation.mteb_model import IMAGE_DOCUMENT, MTEBEncoder


@pytest.fixture(scope="module")
def encoder(request):
    golden = request.getfixturevalue("golden")
    return MTEBEncoder(str(golden / "qwen2_vl"), device="cpu")


def test_protocol_and_metadata(encoder):
    from mteb.models.models_protocols import EncoderProtocol

    assert isinstance(encoder, EncoderProtocol)
    meta = encoder.mteb_model_meta
    assert meta.name == "golden/qwen2_vl" and meta.embed_dim == encoder.model.embedding_dim
    assert set(meta.modalities) == {"text", "image", "video"} and meta.n_parameters > 1000


def test_retrieval_scores_are_those_of_the_vectors(encoder):
    """mteb's nDCG on its mock retrieval equals the one computed by hand from encode_query / encode_document."""
    from mteb.mocks.mock_tasks import MockRetrievalTask

    task = MockRetrievalTask()
    scores = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False).task_results[0].scores["test"][0]
    task.load_data()
    split = task.dataset["default"]["test"]
    instruction = encoder.instruction(task.metadata, "query")
    q = encoder.model.encode([{"text": r["text"], **({"instruction": instruction} if instruction else {})} for r in split["queries"]])
    d = encoder.model.encode([f"{r['title']} {r['text']}".strip() for r in split["corpus"]])
    names = [r["id"] for r in split["corpus"]]
    hits = []
    for row, query in zip(q @ d.T, split["queries"]):
        best = names[int(np.argmax(row))]
        hits.append(float(split["relevant_docs"][query["id"]].get(best, 0) > 0))
    assert scores["accuracy" if "accuracy" in scores else "hit_rate_at_1"] == pytest.approx(np.mean(hits))


def test_instructions_and_layout():
    class Fake:
        source = "org/fake"

        def encode(self, inputs, **options):
            self.seen = list(inputs)
            return np.zeros((len(inputs), 3), dtype=np.float32)

    class Meta:
        name, type, prompt, modalities = "T", "Retrieval", {"query": "Find it."}, ["text", "image"]

    fake = Fake()
    encoder = MTEBEncoder(fake, instructions={"Retrieval": {"document": "A page."}})
    encoder.encode([{"text": ["a", ""], "image": ["p1", "p2"]}], task_metadata=Meta, prompt_type="query")
    assert fake.seen == [{"text": "a", "image": "p1", "instruction": "Find it."}, {"text": "", "image": "p2", "instruction": "Find it."}]
    encoder.encode([{"image": ["p1"]}], task_metadata=Meta, prompt_type="document")
    assert fake.seen == [{"image": "p1", "instruction": "A page."}]
    plain = MTEBEncoder(fake)
    plain.encode([{"text": ["a"]}], task_metadata=Meta, prompt_type="document")
    assert fake.seen == [{"text": "a"}], "text documents stay bare"
    plain.encode([{"image": ["p1"]}], task_metadata=Meta, prompt_type="document")
    assert fake.seen == [{"image": "p1", "instruction": IMAGE_DOCUMENT}]
    plain.encode([{"video": [torch.zeros(2, 3, 4, 5)]}], task_metadata=Meta, prompt_type="query")
    assert [f.size for f in fake.seen[0]["video"]] == [(5, 4), (5, 4)]
    assert plain.encode([], task_metadata=Meta).shape[0] == 0
    with pytest.raises(ValueError, match="text, image or video, got audio"):
        plain.encode([{"audio": [1]}], task_metadata=Meta)
