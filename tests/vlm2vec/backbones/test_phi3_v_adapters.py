"""Adapters of Phi-3.5-V and LLaVA-Next: DoRA on the reference's targets, old tensor names, `.bin` files, merging."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlm2vec.model import VLM2Vec

# The reference's list of target names, as on TIGER-Lab/VLM2Vec-LoRA (rank 8, DoRA, Gaussian).
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "k_proj", "q_proj", "out_proj", "v_proj"]


def inputs():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8))
    return ["a photo of a cat", {"text": "<|image_1|>\nRepresent the given image.\n", "image": image}]


@pytest.fixture(scope="module", params=["phi3_v", "llava_next"])
def adapted(request, golden, tmp_path_factory):
    """A base, its DoRA adapter with random weights, and the folder that the adapter was saved to."""
    folder = golden / request.param
    model = VLM2Vec.from_pretrained(folder)
    base = model.encode(inputs())
    model.add_adapter(r=4, alpha=8, dora=True, targets=TARGETS)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, p in model.model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
            if "lora_magnitude_vector" in name:
                p.mul_(1 + 0.2 * torch.rand(p.shape, generator=generator))
    saved = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(saved)
    assert np.abs(model.encode(inputs()) - base).max() > 1e-2
    return folder, model, saved


def test_decoder_and_tower_are_both_adapted(adapted):
    folder, model, saved = adapted
    names = set(load_file(saved / "adapter_model.safetensors"))
    magnitudes = [n for n in names if "lora_magnitude_vector" in n]
    assert len(names) == 3 * len(magnitudes)
    tower = [n for n in magnitudes if "encoder.layers" in n]
    fused = model.family == "phi3_v"
    assert len(tower) == 3 * 4 and len(magnitudes) - len(tower) == 2 * (4 if fused else 5)
    if fused:  # the names of TIGER-Lab/VLM2Vec-LoRA
        assert "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight" in names
        tower_name = "base_model.model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers.2.self_attn.k_proj.lora_B.weight"
        assert tower_name in names


def test_adapter_reloads(adapted):
    folder, model, saved = adapted
    again = VLM2Vec.from_pretrained(saved)
    np.testing.assert_allclose(again.encode(inputs()), model.encode(inputs()), atol=1e-6, rtol=0)


def test_merged_agrees(adapted, tmp_path):
    folder, model, saved = adapted
    want = model.encode(inputs())
    model.save_pretrained(tmp_path, merge=True)
    assert set(load_file(tmp_path / "model.safetensors")) <= set(load_file(folder / "model.safetensors"))
    np.testing.assert_allclose(VLM2Vec.from_pretrained(tmp_path).encode(inputs()), want, atol=1e-5, rtol=0)
    again = VLM2Vec.from_pretrained(saved)
    again.merge_adapter()
    np.testing.assert_allclose(again.encode(inputs()), want, atol=1e-5, rtol=0)


def test_bin_adapter_under_the_names_of_its_time(adapted, tmp_path):
    """As the public adapters are: a .bin file, tensors named after the transformers of 2024."""
    folder, model, saved = adapted
    old = {}
    for name, value in load_file(saved / "adapter_model.safetensors").items():
        if model.family == "llava_next":
            name = name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model.")
            name = name.replace("base_model.model.model.vision_tower.", "base_model.model.vision_tower.vision_model.")
        old[name] = value
    torch.save(old, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text((saved / "adapter_config.json").read_text())
    again = VLM2Vec.from_pretrained(tmp_path)
    np.testing.assert_allclose(again.encode(inputs()), model.encode(inputs()), atol=1e-6, rtol=0)


def test_a_tensor_without_a_place_is_named(adapted, tmp_path):
    folder, model, saved = adapted
    tensors = load_file(saved / "adapter_model.safetensors")
    tensors = {n.replace("layers.1.", "layers.9."): v for n, v in tensors.items()}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text((saved / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match="layers.9"):
        VLM2Vec.from_pretrained(tmp_path)
    settings = json.loads((saved / "adapter_config.json").read_text())
    assert settings["use_dora"] is True and settings["base_model_name_or_path"] == str(folder)


def test_a_full_model_replaces_the_adapter_saved_there_before(adapted, tmp_path):
    """Left in place, the old adapter would win at the next load, over the base and not over what was just saved."""
    folder, model, saved = adapted
    target = tmp_path / "out"
    target.mkdir()
    again = VLM2Vec.from_pretrained(saved)
    again.save_pretrained(target)
    (target / "model-00001-of-00002.safetensors").write_bytes(b"from an earlier save")
    (target / "notes.txt").write_text("the user's own")
    again.save_pretrained(target, merge=True)
    names = {p.name for p in target.iterdir()}
    assert "notes.txt" in names and not any(n.startswith(("adapter_", "model-")) for n in names)
    reloaded = VLM2Vec.from_pretrained(target)
    assert reloaded.adapter_settings is None
    np.testing.assert_allclose(reloaded.encode(inputs()), model.encode(inputs()), atol=1e-5, rtol=0)
