"""The model as a SentenceTransformer, in memory and from a saved folder: text, an image, and both in one input."""

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny_generic import BUILDERS as GENERIC
from tests.helpers.tiny_models import BUILDERS, qwen3_vl
from vlm2vec.model import VLM2Vec

st = pytest.importorskip("sentence_transformers")
FAMILIES = {**BUILDERS, **GENERIC}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
INPUTS = ["a photo of a cat", {"text": "<|image_1|>\nwhat?", "image": PICTURE}, PICTURE, {"text": "what?", "image": PICTURE}, "b"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_same_embeddings(family, tmp_path):
    FAMILIES[family](tmp_path)
    model = VLM2Vec.from_pretrained(tmp_path)
    rows = model.encode(INPUTS)
    wrapped = model.to_sentence_transformer()
    np.testing.assert_allclose(wrapped.encode(INPUTS), rows, atol=1e-6)
    np.testing.assert_allclose(wrapped.encode("x", prompt="find "), model.encode("find x"), atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="trust_remote_code"):
        st.SentenceTransformer(str(tmp_path / "saved"))
    loaded = st.SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True)
    np.testing.assert_allclose(loaded.encode(INPUTS), rows, atol=1e-6)


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_qwen3_vl_embedding_as_published_and_in_stock_modules(tmp_path):
    """Template, instruction, M-RoPE: a folder named as the published ones needs no options, and stock modules agree."""
    source = tmp_path / "Qwen3-VL-Embedding-tiny"
    qwen3_vl(source)
    model = VLM2Vec.from_pretrained(source, pixels="torchvision")
    assert model.options["chat_template"] and model.options["max_pixels"] == 1800 * 32 * 32 and model.options["positions"] == "mrope"
    text = model.processing.tokenizer.decode(model.preprocess([{"image": PICTURE, "text": "what?", "instruction": "Find it"}])[0].input_ids)
    head, _, rest = text.partition("<|vision_start|>")
    assert head == "<|im_start|>system\nFind it.<|im_end|>\n<|im_start|>user\n"
    assert rest.replace("<|image_pad|>", "") == "<|vision_end|>what?<|im_end|>\n<|im_start|>assistant\n"
    np.testing.assert_array_equal(model.encode_query("cat"), model.encode("cat"))
    np.testing.assert_array_equal(model.encode("cat", prompt="Find it"), model.encode({"text": "cat", "instruction": "Find it."}))
    assert model.encode("cat", truncate_dim=4).shape == (4,)

    model.processing.tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path / "saved")
    loaded = st.SentenceTransformer(str(tmp_path / "saved"))
    for x in ("cat", PICTURE, {"image": PICTURE, "text": "what?"}):
        np.testing.assert_allclose(loaded.encode(x), model.encode(x), atol=1e-5)
