"""Folders: every weight accounted for, adapters with every tensor used, saved models that reload as trained."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_generic import gemma3, smolvlm
from tests.helpers.tiny_models import qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl
from vlm2vec.checkpoint import adapters
from vlm2vec.model import VLM2Vec

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
INPUTS = ["a photo of a cat", {"text": "<|image_1|>\nwhat?", "image": PICTURE}, PICTURE, "b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_vl")
    qwen2_vl(folder)
    return folder


def copy(folder, target, change=None):
    """A copy of a model folder with its weights changed by `change(tensors)`."""
    target.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    if change is not None:
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def filled(model, **lora):
    """The model with an adapter that changes its embeddings."""
    model.add_adapter(r=3, alpha=7, **lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def generates(folder, model):
    """The folder is one that transformers, and servers built like it, load as the family's generation class."""
    from transformers import AutoModelForImageTextToText

    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"] and set(info["missing_keys"]) <= {"lm_head.weight"} and not info["mismatched_keys"]
    assert json.loads((folder / "config.json").read_text())["architectures"] == [model.backbone.architecture]


# -- weights -----------------------------------------------------------------------------------------------------------


def test_misfits_are_all_listed(folder, tmp_path):
    def spoil(tensors):
        tensors["model.strange.weight"] = torch.ones(2)
        del tensors["model.norm.weight"]
        tensors["visual.merger.ln_q.bias"] = torch.ones(3)
        tensors["lm_head.weight"] = torch.ones(2, 2)  # not part of the embedding model, whatever it holds

    with pytest.raises(ValueError) as e:
        VLM2Vec.from_pretrained(copy(folder, tmp_path / "bad", spoil))
    message = str(e.value)
    for part in ("strange.weight", "language_model.norm.weight", "visual.merger.ln_q.bias"):
        assert part in message
    assert "lm_head" not in message


def test_a_vision_weight_that_is_missing_is_noticed(folder, tmp_path):
    with pytest.raises(ValueError, match="checkpoint lacks: visual.blocks.1.attn.proj.weight"):
        VLM2Vec.from_pretrained(copy(folder, tmp_path / "bad", lambda t: t.pop("visual.blocks.1.attn.proj.weight")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d / "config.json").unlink(), "neither config.json nor adapter_config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "config.json").write_text("{}"), "no model_type"),
        (lambda d: (d / "config.json").write_text('{"model_type": "nonsense"}'), "'nonsense' is unknown"),
        (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "not a vision-language model"),
        (lambda d: (d / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda d: (d / "model.safetensors").write_bytes(b"junk"), "cannot be loaded"),
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer or processor"),
        (lambda d: (d / "preprocessor_config.json").unlink(), "no tokenizer or processor"),
    ],
)
def test_broken_folders(folder, tmp_path, change, said):
    broken = copy(folder, tmp_path / "broken")
    change(broken)
    with pytest.raises(ValueError, match=said):
        VLM2Vec.from_pretrained(broken)


def test_wrong_arguments(folder):
    for kwargs, said in (
        ({"positions": "2d"}, "expected 'sequential' or 'mrope'"),
        ({"min_pixel": 1}, "unknown options"),
        ({"dtype": "float17"}, "expected 'auto'"),
        ({"attn": "fast"}, "expected 'auto'"),
        ({"quantize": "int3"}, "expected 'nf4'"),
        ({"base": "x"}, "not an adapter"),
        ({"layout": "other"}, "layout"),
    ):
        with pytest.raises(ValueError, match=said):
            VLM2Vec.from_pretrained(folder, **kwargs).encode({"text": "a", "instruction": "b"})
    with pytest.raises(ValueError, match="no such folder"):
        VLM2Vec.from_pretrained("./not/there")
    model = VLM2Vec.from_pretrained(folder)
    for kwargs, said in (({"truncate_dim": 99}, "expected 1 to 32"), ({"batch_size": 0}, "at least 1")):
        with pytest.raises(ValueError, match=said):
            model.encode(["a"], **kwargs)


# -- reloading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5, smolvlm, gemma3], ids=lambda b: b.__name__)
def test_saved_folders_reload_as_trained_and_as_the_hubs(build, tmp_path):
    from transformers import AutoProcessor

    build(tmp_path)
    options = {} if build in (smolvlm, gemma3) else {"positions": "mrope", "min_pixels": 64 * 64, "max_length": 500}
    model = VLM2Vec.from_pretrained(tmp_path, **options)
    model.prompts["query"] = "find "
    rows = model.encode(INPUTS)
    model.save_pretrained(tmp_path / "saved")
    again = VLM2Vec.from_pretrained(tmp_path / "saved")
    assert again.options == model.options and again.prompts == model.prompts
    np.testing.assert_allclose(again.encode(INPUTS), rows, atol=1e-6)
    assert AutoProcessor.from_pretrained(tmp_path / "saved").tokenizer is not None
    generates(tmp_path / "saved", model)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".saving")]


def test_dtype_and_truncation(folder):
    model = VLM2Vec.from_pretrained(folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    rows, truth = model.encode(INPUTS), VLM2Vec.from_pretrained(folder).encode(INPUTS)
    assert rows.dtype == np.float32 and (rows * truth).sum(-1).min() > 0.99
    short = VLM2Vec.from_pretrained(folder).encode(INPUTS, truncate_dim=8)
    np.testing.assert_allclose(short, truth[:, :8] / np.linalg.norm(truth[:, :8], axis=1, keepdims=True), atol=1e-6)
    raw = VLM2Vec.from_pretrained(folder).encode(INPUTS, normalize_embeddings=False, convert_to_tensor=True)
    torch.testing.assert_close(model.similarity(raw, truth).diagonal(), torch.ones(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("build", [qwen2_5_vl, qwen3_vl, qwen3_5, smolvlm, gemma3], ids=lambda b: b.__name__)
def test_every_familys_adapter_merges_and_reloads(build, tmp_path):
    """Phi-3.5-V and LLaVA-Next have theirs in test_phi3_v_adapters.py, Qwen2-VL below."""
    (tmp_path / "base").mkdir()
    build(tmp_path / "base")
    plain = VLM2Vec.from_pretrained(tmp_path / "base")
    model = filled(VLM2Vec.from_pretrained(tmp_path / "base"), dora=True)
    rows = model.encode(INPUTS)
    assert np.abs(rows - plain.encode(INPUTS)).max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "merged", merge=True)
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(saved) == sum(p.requires_grad for p in model.parameters()) and sum("magnitude" in k for k in saved) == len(saved) // 3
    for again in (VLM2Vec.from_pretrained(tmp_path / "adapter"), VLM2Vec.from_pretrained(tmp_path / "merged"), model.merge_adapter()):
        np.testing.assert_allclose(again.encode(INPUTS), rows, atol=1e-5)
    generates(tmp_path / "merged", model)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapter_merged_and_reloaded_agree(folder, tmp_path, dora):
    model = filled(VLM2Vec.from_pretrained(folder), dora=dora)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in n for n in trained)
    rows = model.encode(INPUTS)
    assert np.abs(rows - VLM2Vec.from_pretrained(folder).encode(INPUTS)).max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "merged", merge=True)
    np.testing.assert_array_equal(model.encode(INPUTS), rows)  # merging on the way out left the model as it was
    assert not (tmp_path / "adapter/model.safetensors").exists()
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(saved) == len(trained) and sum("magnitude" in k for k in saved) == (len(saved) // 3 if dora else 0)
    again = VLM2Vec.from_pretrained(tmp_path / "adapter")
    np.testing.assert_allclose(again.encode(INPUTS), rows, atol=1e-6)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained  # ready to train on
    np.testing.assert_allclose(again.merge_adapter().encode(INPUTS), rows, atol=1e-5)
    assert not adapters.has_adapter(again) and not any(".lora_" in n for n, _ in again.named_parameters())
    np.testing.assert_allclose(VLM2Vec.from_pretrained(tmp_path / "merged").encode(INPUTS), rows, atol=1e-5)
    # the merged form is laid out as the base is: names, class, processor; that is what vLLM's pooling runner loads
    merged, base = load_file(tmp_path / "merged/model.safetensors"), load_file(folder / "model.safetensors")
    assert merged.keys() == base.keys() and all(merged[k].shape == base[k].shape and merged[k].dtype == base[k].dtype for k in base)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"] and "quantization_config" not in config
    assert {"preprocessor_config.json", "processor_config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "merged").iterdir()}
    assert json.loads((tmp_path / "merged/preprocessor_config.json").read_text())["image_processor_type"] == "Qwen2VLImageProcessor"
    assert not (tmp_path / "merged/adapter_config.json").exists()


def old_style(source, target):
    """As the public adapters are: .bin, names from before `model.language_model`, bare magnitude vectors."""
    target.mkdir()
    tensors = {
        k.replace(".model.language_model.", ".model.").replace("magnitude_vector.weight", "magnitude_vector"): v
        for k, v in load_file(source / "adapter_model.safetensors").items()
    }
    assert all(k.startswith("base_model.model.model.layers.") for k in tensors)
    torch.save(tensors, target / "adapter_model.bin")
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    return tensors


def test_public_adapters_names_and_format(folder, tmp_path):
    """The adapter folder may lack processor files and may name targets that other backbones have."""
    model = filled(VLM2Vec.from_pretrained(folder), dora=True)
    rows = model.encode(INPUTS)
    model.save_pretrained(tmp_path / "new")
    tensors = old_style(tmp_path / "new", tmp_path / "old")
    again = VLM2Vec.from_pretrained(tmp_path / "old")
    np.testing.assert_allclose(again.encode(INPUTS), rows, atol=1e-6)
    assert adapters.load(
        VLM2Vec.from_pretrained(folder), str(tmp_path / "old"), json.loads((tmp_path / "old/adapter_config.json").read_text())
    ) == len(tensors)


def test_the_v1_adapters_are_fed_as_they_were_scored(folder, tmp_path):
    filled(VLM2Vec.from_pretrained(folder)).save_pretrained(tmp_path / "new")
    for name, resolution, tokens in (("VLM2Vec-Qwen2VL-2B", "high", 1225), ("VLM2Vec-V2.0", None, 6)):
        old_style(tmp_path / "new", tmp_path / name)
        model = VLM2Vec.from_pretrained(tmp_path / name)
        assert model.options["resolution"] == resolution
        assert model.processing(PICTURE).length == tokens
    assert VLM2Vec.from_pretrained(tmp_path / "VLM2Vec-Qwen2VL-2B", resolution=None).processing(PICTURE).length == 6


def test_adapters_that_do_not_fit(folder, tmp_path):
    filled(VLM2Vec.from_pretrained(folder)).save_pretrained(tmp_path / "good")
    file, settings = tmp_path / "good/adapter_model.safetensors", tmp_path / "good/adapter_config.json"
    tensors = load_file(file)
    first = sorted(tensors)[0]

    def attempt(changed, said, **kwargs):
        save_file(changed, file)
        with pytest.raises(ValueError, match=said):
            VLM2Vec.from_pretrained(tmp_path / "good", **kwargs)

    attempt(
        {**tensors, "base_model.model.model.language_model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(3, 32)},
        "1 of 21 tensors have no place",
    )
    attempt({k.replace("layers", "blocks"): v for k, v in tensors.items()}, "20 of 20 tensors have no place")
    attempt({k: v for k, v in tensors.items() if k != first}, "lacks 1 tensors")
    attempt({**tensors, first: torch.ones(3, 5)}, "has shape")
    smolvlm(tmp_path / "other")
    attempt(tensors, "tensors have no place", base=tmp_path / "other")
    attempt(tensors, "not there|no such folder", base="/nowhere/base")
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "base_model_name_or_path": None}))
    attempt(tensors, "names no base model")
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "peft_type": "IA3"}))
    attempt(tensors, "only LORA", base=folder)
    file.unlink()
    with pytest.raises(ValueError, match="neither adapter_model"):
        VLM2Vec.from_pretrained(tmp_path / "good", base=folder)


def test_an_adapter_is_never_unpickled(folder, tmp_path):
    filled(VLM2Vec.from_pretrained(folder)).save_pretrained(tmp_path / "a")
    (tmp_path / "a/adapter_model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    torch.save({"x": Bomb()}, tmp_path / "a/adapter_model.bin")
    with pytest.raises(ValueError, match="cannot be read safely"):
        VLM2Vec.from_pretrained(tmp_path / "a")


def test_an_adapter_on_a_saved_model_inherits_its_settings(folder, tmp_path):
    VLM2Vec.from_pretrained(folder, positions="mrope", max_length=99).save_pretrained(tmp_path / "base")
    model = filled(VLM2Vec.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    again = VLM2Vec.from_pretrained(tmp_path / "adapter")
    assert again.options["positions"] == "mrope" and again.options["max_length"] == 99 and again.base_source == str(tmp_path / "base")


def test_four_bit_base(folder, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    # A CPU with AVX512-BF16 would re-pack the weights in the first forward call, which these narrow layers do not survive.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = filled(VLM2Vec.from_pretrained(folder, quantize="nf4", device="cpu"), dora=True)
    kinds = {
        n.partition(".")[0]: type(m.get_base_layer() if hasattr(m, "get_base_layer") else m).__name__
        for n, m in model.model.named_modules()
        if "proj" in n
    }
    assert "Linear4bit" in {type(m).__name__ for m in model.model.modules()} and kinds["visual"] != "Linear4bit"
    model.train()
    model(model.pack(model.preprocess(INPUTS))).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    rows = model.eval().encode(INPUTS)
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "merged", merge=True)
    np.testing.assert_allclose(VLM2Vec.from_pretrained(tmp_path / "adapter", quantize="nf4", device="cpu").encode(INPUTS), rows, atol=1e-5)
    np.testing.assert_allclose(VLM2Vec.from_pretrained(tmp_path / "merged").encode(INPUTS), rows, atol=1e-5)


def liger_qwen2_vl(
    rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, layer_norm=True, swiglu=True, model=None
):
    """The signature of liger-kernel 0.8's function for Qwen2-VL; that of the installed package is compared where there is one."""
    CALLS.append(
        {"cross_entropy": cross_entropy, "fused_linear_cross_entropy": fused_linear_cross_entropy, "rms_norm": rms_norm, "model": model}
    )


CALLS = []


def test_liger_is_applied_to_the_bare_module_without_its_losses(folder, monkeypatch):
    import importlib.util
    import inspect
    import sys
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from vlm2vec.checkpoint.quantization import apply_liger

    model = VLM2Vec.from_pretrained(folder, device="cpu")
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        theirs = inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN["qwen2_vl"]).parameters
        assert {"cross_entropy", "fused_linear_cross_entropy", "model"} <= set(theirs)
    else:
        with pytest.raises(ValueError, match="pip install liger-kernel"):
            apply_liger(model)
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2_vl": liger_qwen2_vl}
    with pytest.raises(ValueError, match="needs CUDA, the model is on cpu"):
        apply_liger(model)
    monkeypatch.setattr(VLM2Vec, "device", torch.device("cuda"))
    CALLS.clear()
    apply_liger(model)
    assert CALLS == [{"cross_entropy": False, "fused_linear_cross_entropy": False, "rms_norm": True, "model": model.model}]
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"phi4": liger_qwen2_vl}
    with pytest.raises(ValueError, match="no kernels for qwen2_vl; there are phi4"):
        apply_liger(model)
