"""The native Phi-3.5-V module: the reference's outputs, the published weight names, long context, adapters, dtypes."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.helpers.golden_files import read
from tests.helpers.phi3_v_crops import image_crops
from vlm2vec.attention import TEXT_ATTENTION, Segments, register
from vlm2vec.backbones.phi3_v.config import Phi3VConfig
from vlm2vec.backbones.phi3_v.model import Phi3VForCausalLM, Phi3VModel, Phi3VRotary

CLIP = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14)


def tiny(**changes) -> Phi3VConfig:
    head = 8
    settings = dict(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=16,
        rope_scaling={"type": "su", "short_factor": [1.0] * (head // 2), "long_factor": [1.0, 2.0, 4.0, 8.0]},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        vision_config=CLIP,
    )
    return Phi3VConfig(**{**settings, **changes})


def tiny_model(**changes) -> Phi3VModel:
    torch.manual_seed(1)
    model = Phi3VModel(tiny(**changes)).eval()
    with torch.no_grad():
        for p in model.parameters():  # fresh weights are so small that no layer would matter
            p.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def phi(golden):
    folder, cases, expected = read(golden, "phi3_v")
    return folder, cases, expected, AutoModel.from_pretrained(folder).eval()


def unfold(runs):
    return torch.tensor([value for value, count in runs for _ in range(count)])


def vision(folder, items, num_crops):
    views = [image_crops(Image.open(folder / i["image"]), num_crops) for i in items if i["image"]]
    if not views:
        return None, []
    return torch.cat([c for c, _ in views]), [(h // 336, w // 336) for _, (h, w) in views]


def test_reference_hidden_states_padded(phi):
    """Every batch of the reference with its own ids and mask, images included."""
    folder, cases, expected, model = phi
    for name, batch in cases["batches"].items():
        ids = torch.stack([unfold(i["input_ids_run_length"]) for i in batch["items"]])
        mask = torch.stack([unfold(i["attention_mask_run_length"]) for i in batch["items"]])
        crops, grids = vision(folder, batch["items"], cases["num_crops"])
        with torch.no_grad():
            features = None if crops is None else model.get_image_features(crops, grids)
            hidden = model(ids, attention_mask=mask, image_features=features).last_hidden_state
        last = hidden[torch.arange(len(ids)), torch.tensor(batch["pooled_index"])]
        torch.testing.assert_close(last, expected[f"{name}.hidden_last_token_unnormalized"], atol=1e-5, rtol=0)
        if f"{name}.image_embeddings_first16" in expected:
            for part, key in ((features[:16], "first16"), (features[-16:], "last16")):
                # these features are of size 200 (the fixture's weights are scaled up): fp32 itself errs by 1e-3
                want = expected[f"{name}.image_embeddings_{key}"]
                assert (part - want).abs().max() <= 1e-5 * want.abs().max()


def published_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of microsoft/Phi-3.5-vision-instruct, written out from its published sizes."""
    vocabulary, hidden, inner, clip, clip_inner = 32064, 3072, 8192, 1024, 4096
    names = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    names["lm_head.weight"] = (vocabulary, hidden)
    for i in range(32):
        layer = f"model.layers.{i}."
        names[layer + "input_layernorm.weight"] = (hidden,)
        names[layer + "post_attention_layernorm.weight"] = (hidden,)
        names[layer + "self_attn.qkv_proj.weight"] = (3 * hidden, hidden)
        names[layer + "self_attn.o_proj.weight"] = (hidden, hidden)
        names[layer + "mlp.gate_up_proj.weight"] = (2 * inner, hidden)
        names[layer + "mlp.down_proj.weight"] = (hidden, inner)
    image = "model.vision_embed_tokens."
    names[image + "glb_GN"] = (1, 1, 4 * clip)
    names[image + "sub_GN"] = (1, 1, 1, 4 * clip)
    names[image + "img_projection.0.weight"], names[image + "img_projection.0.bias"] = (hidden, 4 * clip), (hidden,)
    names[image + "img_projection.2.weight"], names[image + "img_projection.2.bias"] = (hidden, hidden), (hidden,)
    tower = image + "img_processor.vision_model."
    names[tower + "embeddings.class_embedding"] = (clip,)
    names[tower + "embeddings.patch_embedding.weight"] = (clip, 3, 14, 14)
    names[tower + "embeddings.position_embedding.weight"] = (24 * 24 + 1, clip)
    for norm in ("pre_layrnorm", "post_layernorm"):
        names[tower + norm + ".weight"] = names[tower + norm + ".bias"] = (clip,)
    for i in range(24):
        layer = f"{tower}encoder.layers.{i}."
        for norm in ("layer_norm1", "layer_norm2"):
            names[layer + norm + ".weight"] = names[layer + norm + ".bias"] = (clip,)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names[f"{layer}self_attn.{projection}.weight"] = (clip, clip)
            names[f"{layer}self_attn.{projection}.bias"] = (clip,)
        names[layer + "mlp.fc1.weight"], names[layer + "mlp.fc1.bias"] = (clip_inner, clip), (clip_inner,)
        names[layer + "mlp.fc2.weight"], names[layer + "mlp.fc2.bias"] = (clip, clip_inner), (clip,)
    return names


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return Phi3VForCausalLM(Phi3VConfig())


def test_every_published_weight_has_its_place(full_size):
    names = published_names()
    assert {k: tuple(v.shape) for k, v in full_size.state_dict().items()} == names
    assert len(names) == 3 + 32 * 6 + 6 + 7 + 24 * 16
    # TIGER-Lab/VLM2Vec-Full, as mteb's vlm2vec_models.py counts it; the second name of the token table is not counted twice
    assert sum(p.numel() for p in full_size.parameters()) == 4_146_621_440


def test_the_published_lora_adapter_fits_in_size(full_size):
    """mteb's vlm2vec_models.py gives 4,161,891,328 for TIGER-Lab/VLM2Vec-LoRA: DoRA of rank 8 on all projections of the decoder
    and on the attention of the tower, which is what the reference's list of target names selects."""
    peft = pytest.importorskip("peft")
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "k_proj", "q_proj", "out_proj", "v_proj"]
    config = peft.LoraConfig(r=8, target_modules=targets, use_dora=False)
    with torch.device("meta"):
        adapted = peft.get_peft_model(Phi3VForCausalLM(Phi3VConfig()), config)
    shapes = {n: p.shape for n, p in adapted.named_parameters() if p.requires_grad}
    magnitudes = sum(shape[0] for name, shape in shapes.items() if "lora_B" in name)  # one per output row
    total = sum(p.numel() for p in adapted.parameters()) + magnitudes
    assert total == 4_161_891_328
    first = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.default.weight"
    assert shapes[first] == (8, 3072)


@pytest.mark.parametrize("stored", ["both", "embed_tokens"])
def test_token_table_is_stored_once_or_twice(golden, tmp_path, stored):
    folder = golden / "phi3_v"
    weights = load_file(folder / "model.safetensors")
    twice = "model.vision_embed_tokens.wte.weight"
    torch.testing.assert_close(weights[twice], weights["model.embed_tokens.weight"], atol=0, rtol=0)
    if stored == "embed_tokens":
        del weights[twice]
    from safetensors.torch import save_file

    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for kind in (AutoModel, AutoModelForCausalLM):
        _, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_save_and_reload(tmp_path, golden):
    model = AutoModelForCausalLM.from_pretrained(golden / "phi3_v")
    model.save_pretrained(tmp_path)
    saved = set(load_file(tmp_path / "model.safetensors"))
    assert saved == set(load_file(golden / "phi3_v" / "model.safetensors")) - {"model.vision_embed_tokens.wte.weight"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.vision_config.hidden_size == 32  # read back without clip_vision_config.json
    ids = torch.tensor([[1, 325, 442, 356]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)


def crops_for(grids, seed=3, dtype=torch.float32):
    count = sum(1 + h * w for h, w in grids)
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_image_tokens_in_reading_order():
    """Each token must come from the four patches that it covers: a stand-in tower hands out patch numbers."""
    model = tiny_model()
    image = model.vision_embed_tokens
    h, w, side = 2, 3, 4  # crops of 4 x 4 patches: 2 x 2 tokens each
    numbers = torch.arange((1 + h * w) * side * side, dtype=torch.float32).view(1 + h * w, side * side, 1).expand(-1, -1, 16)
    image.img_processor.forward = lambda pixels: numbers
    image.img_projection = torch.nn.Identity()
    with torch.no_grad():
        image.glb_GN.fill_(-2)
        image.sub_GN.fill_(-1)
        tokens = image(torch.zeros(1 + h * w, 3, 28, 28), [(h, w)])[:, ::16]  # (V, 4): the four merged patches

    def lines(first_crop, rows, columns):
        for y in range(rows * 2):
            for x in range(columns * 2):
                crop = first_crop + (y // 2) * columns + x // 2
                corner = crop * 16 + (y % 2) * 2 * side + (x % 2) * 2
                yield [corner, corner + 1, corner + side, corner + side + 1]
            yield [-1] * 4

    expected = [*lines(1, h, w), [-2] * 4, *lines(0, 1, 1)]
    assert tokens.tolist() == expected


def test_images_do_not_depend_on_their_neighbours():
    model = tiny_model()
    grids = [(1, 1), (2, 1), (1, 3)]
    crops = crops_for(grids)
    together = model.get_image_features(crops, grids)
    at = row = 0
    for h, w in grids:
        alone = model.get_image_features(crops[at : at + 1 + h * w], [(h, w)])
        torch.testing.assert_close(together[row : row + len(alone)], alone, atol=2e-5, rtol=1e-5)
        at, row = at + 1 + h * w, row + len(alone)
    assert row == len(together)
    with pytest.raises(ValueError, match="expected 9 for grids"):
        model.get_image_features(crops[:-1], [(2, 2), (1, 3)])


def test_rope_follows_the_su_formula():
    """cos(p / (factor * theta^(2i/d))) * sqrt(1 + ln(stretch) / ln(original)), long factors beyond the original length."""
    rotary = Phi3VRotary(tiny())
    position = torch.arange(5)[None]
    for factors, is_long in (([1.0] * 4, False), ([1.0, 2.0, 4.0, 8.0], True)):
        cos, sin = rotary(position, torch.float64, torch.full((1, 5), True) if is_long else None)
        frequency = torch.tensor([1 / (f * 10000 ** (2 * i / 8)) for i, f in enumerate(factors)], dtype=torch.float64)
        angle = position[0, :, None] * frequency.repeat(2)
        scale = (1 + torch.tensor(256 / 16).log() / torch.tensor(16.0).log()).sqrt().double()
        torch.testing.assert_close(cos[0], angle.cos() * scale, atol=1e-6, rtol=0)
        torch.testing.assert_close(sin[0], angle.sin() * scale, atol=1e-6, rtol=0)


def packed_hidden(model, rows):
    register()
    model.set_attn_implementation({"": TEXT_ATTENTION, "vision_config": "sdpa"})
    lengths = [len(r) for r in rows]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    out = model(torch.cat(rows)[None], position_ids=positions, segments=Segments.from_lengths(lengths, causal=True))
    return out.last_hidden_state[0].split(lengths)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_long_and_short_samples_share_a_batch(dtype, tolerance):
    """A long sample must not switch its neighbours to the long factors, which the reference's padded batches do."""
    model = tiny_model().to(dtype)
    rows = [torch.randint(3, 96, (n,)) for n in (5, 40, 16, 17, 1)]  # 16 is the original context, 17 just beyond
    with torch.no_grad():
        alone = [model(r[None]).last_hidden_state[0] for r in rows]
        padded_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        padded = model(padded_ids, attention_mask=mask).last_hidden_state
        packed = packed_hidden(model, rows)
        for i, (row, want) in enumerate(zip(rows, alone)):
            torch.testing.assert_close(padded[i, : len(row)], want, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(packed[i], want, atol=tolerance, rtol=tolerance)


def test_gradient_checkpointing_gives_the_same_gradients():
    grids = [(1, 2)]
    crops = crops_for(grids)

    def gradients(checkpointing):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        features = model.get_image_features(crops, grids)
        ids = torch.tensor([[1, *[-1] * len(features), 7, 9]])
        model(ids, image_features=features).last_hidden_state[0, -1].square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters()}

    plain, saved = gradients(False), gradients(True)
    unused = {n for n, g in plain.items() if g is None}
    last = "vision_embed_tokens.img_processor.vision_model.encoder.layers.2."
    assert unused and all(n.startswith(last) or "post_layernorm" in n for n in unused)
    for name, gradient in plain.items():
        if gradient is not None:
            torch.testing.assert_close(saved[name], gradient, atol=1e-6, rtol=1e-5)


def test_lora_and_dora_reach_the_fused_projections():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv_proj", "gate_up_proj", "out_proj"], use_dora=True, init_lora_weights="gaussian")
    model = peft.get_peft_model(tiny_model(), config)
    features = model.base_model.model.get_image_features(crops_for([(1, 1)]), [(1, 1)])
    ids = torch.tensor([[1, *[-1] * len(features), 7]])
    model(ids, image_features=features).last_hidden_state[0, -1].sum().backward()
    trained = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None]
    for part in ("layers.1.self_attn.qkv_proj.lora_B", "mlp.gate_up_proj.lora_magnitude_vector", "layers.1.self_attn.out_proj.lora_B"):
        assert any(part in n for n in trained), part


def test_bf16_keeps_rope_in_fp32():
    model = tiny_model()
    before = model.rotary_emb.frequencies(torch.device("cpu")).clone()
    model.to(torch.bfloat16)
    torch.testing.assert_close(model.rotary_emb.frequencies(torch.device("cpu")), before, atol=0, rtol=0)
    out = model(torch.tensor([[1, 5, 9]])).last_hidden_state
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_feature_counts_must_agree():
    model = tiny_model()
    features = model.get_image_features(crops_for([(1, 1)]), [(1, 1)])
    with pytest.raises(ValueError, match="image features for 2 image tokens"):
        model(torch.tensor([[1, -1, -1, 5]]), image_features=features)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"img_processor": {"image_dim_out": 1024}}, "image_dim_out is 1024 but the CLIP tower is 16"),
        ({"embd_layer": {"hd_transform_order": "glb_sub"}}, "hd_transform_order"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "yarn"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}, "expected 4, half a head"),
        ({"vision_config": {**CLIP, "image_size": 42}}, "even number"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
