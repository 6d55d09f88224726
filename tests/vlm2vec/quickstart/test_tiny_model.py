"""The untrained model: Qwen2-VL's own classes, loadable by name, the same for the same seed."""

import pytest
import torch

from vlm2vec.quickstart import build
from vlm2vec.quickstart.benchmark import Size
from vlm2vec.quickstart.catalogue import subjects
from vlm2vec.quickstart.tiny_model import build_model, random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small benchmark and the model made for it."""
    out = tmp_path_factory.mktemp("quickstart")
    build.build_data(out, size=Size(subjects=32, drawings=2, pairs=4, quads=2), workers=1, say=None)
    return build_model(out, seed=5, say=None)


def test_loads_through_the_library_and_encodes_a_picture(folder):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration" and type(processor).__name__ == "Qwen2VLProcessor"
    assert 1.5e6 < sum(p.numel() for p in model.parameters()) < 2.5e6 and model.dtype == torch.float32
    picture = Image.open(next((folder.parent / "data" / "images" / "eval" / "quads").iterdir()))
    inputs = processor(images=[picture], text=["<|image_pad|>\nName it\n"], return_tensors="pt")
    # 84 x 84 pixels are 6 x 6 patches: within the processor's limits, so no resizing, and nine merged tokens
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 6]]
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 9
    inputs.pop("mm_token_type_ids", None)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        hidden = model.model(**inputs, position_ids=torch.arange(length).expand(3, 1, length)).last_hidden_state
    assert hidden.shape == (1, length, 128) and torch.isfinite(hidden).all() and hidden.std() > 0.1


def test_tokenizer_reads_any_text_back(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ["a cat face on a blue background\n", "What is next to the yo-yo?", "naïve 漢字 🦊 \t x  y"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    marker = tokenizer("<|image_pad|>\nhi")["input_ids"]
    assert marker[0] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    short = [s.name for s in subjects()[::10] if " " not in s.name and "-" not in s.name]
    assert sum(len(tokenizer.tokenize(" " + name)) == 1 for name in short) >= 0.9 * len(short)


def test_same_seed_same_folder_other_seed_other_weights(folder, tmp_path):
    from transformers import AutoTokenizer

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert build_model(folder.parent, seed=5, say=None) == folder  # reused
    again = tmp_path / "again"
    again.mkdir()
    (again / "data").symlink_to(folder.parent / "data")
    remade = build_model(again, seed=5, say=None)
    assert {file.name: file.read_bytes() for file in remade.iterdir()} == before
    tokenizer = AutoTokenizer.from_pretrained(folder)
    state = torch.get_rng_state()
    one, two = (random_model(tokenizer, seed).state_dict() for seed in (5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_needs_the_benchmark(tmp_path):
    with pytest.raises(ValueError, match="build the benchmark first"):
        build_model(tmp_path, say=None)
