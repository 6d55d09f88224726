"""Adapters as PEFT writes them, whatever they hold beside LoRA's matrices; and PEFT opens what is written here."""

import json

import numpy as np
import pytest
import torch
from peft import AutoPeftModel, LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForImageTextToText

from tests.helpers.tiny_generic import BUILDERS as GENERIC
from tests.helpers.tiny_models import BUILDERS
from vlm2vec import VLM2Vec

FAMILIES = {**BUILDERS, **GENERIC}
TEXTS = ["a fox", "a photo of two red foxes"]


def last_hidden(module, text_ids):
    """transformers' own embedding of each text: the last token's hidden state, normalised."""
    rows = []
    for ids in text_ids:
        out = module(input_ids=torch.tensor([ids]), output_hidden_states=True)
        hidden = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.hidden_states[-1]
        rows.append(torch.nn.functional.normalize(hidden[0, -1].float(), dim=-1))
    return torch.stack(rows).detach().numpy()


# What the adapter is asked to hold: LoraConfig's options.
KINDS = {
    "LoRA alone": {},
    "norms saved whole": {"modules_to_save": ["norm"]},
    "a layer saved whole": {"modules_to_save": ["down_proj"]},
    "the token table saved whole": {"modules_to_save": ["embed_tokens"]},
    "the head saved whole": {"modules_to_save": ["lm_head"]},
    "all biases": {"bias": "all"},
    "the targets' biases": {"bias": "lora_only"},
    "rows of the token table": {"trainable_token_indices": [297, 150, 20, 199]},
    "rows of a named table": {"trainable_token_indices": {"embed_tokens": [297, 150, 20, 199]}},
    "the token table as a target": {"target_modules": ["q_proj", "embed_tokens"]},
    "everything": {"modules_to_save": ["norm"], "bias": "all", "trainable_token_indices": [297, 150], "use_dora": True},
    "rsLoRA": {"use_rslora": True},
}


@pytest.mark.parametrize("cls", [AutoModel, AutoModelForImageTextToText], ids=["base", "generation"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_writes_loads(kind, cls, folders, tmp_path):
    """The embedding of PEFT's own model; the same after saving, after saving again merged, and after a second reading."""
    base = folders("qwen2_vl")
    tuned = get_peft_model(cls.from_pretrained(base), LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], **KINDS[kind]}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(tmp_path / "peft")
    model = VLM2Vec.from_pretrained(tmp_path / "peft", device="cpu")
    ids = [model.preprocess([text])[0].input_ids.tolist() for text in TEXTS]
    expected = last_hidden(tuned.eval(), ids)
    plain = VLM2Vec.from_pretrained(base, device="cpu").encode(TEXTS)
    assert np.abs(expected - plain).max() > 1e-3, "the adapter changes something"
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=2e-6)
    model.save_pretrained(tmp_path / "again")
    np.testing.assert_allclose(VLM2Vec.from_pretrained(tmp_path / "again", device="cpu").encode(TEXTS), expected, atol=2e-6)
    model.save_pretrained(tmp_path / "merged", merge=True)
    np.testing.assert_allclose(VLM2Vec.from_pretrained(tmp_path / "merged", device="cpu").encode(TEXTS), expected, atol=2e-6)
    opened = AutoPeftModel.from_pretrained(str(tmp_path / "again")).eval()
    np.testing.assert_allclose(last_hidden(opened, ids), expected, atol=2e-6)


def changed(folder, tmp_path, **settings):
    """An adapter folder with other settings."""
    model = VLM2Vec.from_pretrained(folder, device="cpu")
    model.add_adapter(r=2, alpha=4)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return tmp_path


REFUSED = {
    "parameters as targets": ({"target_parameters": ["q_proj.weight"]}, "sets target_parameters, which is not supported here"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "sets layer_replication, which is not supported here"),
    "activated LoRA": ({"alora_invocation_tokens": [5]}, "sets alora_invocation_tokens, which is not supported here"),
    "a bias of LoRA's own": ({"lora_bias": True}, "sets lora_bias, which is not supported here"),
    "two of them": ({"lora_bias": True, "use_qalora": True}, "sets lora_bias, use_qalora, which"),
    "another kind": ({"peft_type": "IA3"}, "adapter of type IA3: only LORA"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_supported_is_named(kind, folders, tmp_path):
    settings, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as caught:
        VLM2Vec.from_pretrained(changed(folders("qwen2_vl"), tmp_path, **settings), device="cpu")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_token_table_of_another_size_is_refused(folders, tmp_path):
    module = AutoModel.from_pretrained(folders("qwen2_vl"))
    module.resize_token_embeddings(400)
    get_peft_model(module, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(400, 32\), the model's is .*merge_and_unload"):
        VLM2Vec.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_auto_peft_opens_every_family(family, folders, tmp_path):
    model = VLM2Vec.from_pretrained(folders(family), device="cpu")
    model.add_adapter(r=2, alpha=8, targets="all-linear")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    ids = [model.preprocess([text])[0].input_ids.tolist() for text in TEXTS]
    allowed = {"import_allowlist": ["vlm2vec"]} if family == "phi3_v" else {}
    opened = AutoPeftModel.from_pretrained(str(tmp_path), **allowed).eval()
    np.testing.assert_allclose(last_hidden(opened.base_model.model.model, ids), model.encode(TEXTS), atol=5e-6)
