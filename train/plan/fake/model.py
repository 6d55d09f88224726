"""The model of a plan: the recipe's own modules over fake weights, from its config alone."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm2vec.backbones import backbone_for, processing_for
from vlm2vec.checkpoint import loading
from vlm2vec.checkpoint.feeding import feeding_of, saved_options
from vlm2vec.model import VLM2Vec

from ...build import prepare
from ...recipe.schema import Recipe

CONFIGS = Path(__file__).parents[1] / "configs"
_BLOCK, _NESTED_BLOCK = 64, 256  # bitsandbytes' own


def known_config(name: str) -> Path | None:
    """The config that this project holds for a name of the hub."""
    path = CONFIGS / f"{name.replace('/', '--')}.json"
    return path if path.is_file() else None


def fake_model(recipe: Recipe, mode: FakeTensorMode) -> VLM2Vec:
    """The model as `train.build.build_model` would load it, without reading a weight or allocating one.

    Raises:
        ValueError: no config for the recipe's model, or the recipe asks for what the model does not have.
    """
    # Made on the meta device, where no operation holds bytes, and brought to the CPU that the mode plays at the end.
    model = model_of_config(recipe, torch.device("meta"))
    with mode:
        _to_cpu(model)
    return model


def model_of_config(recipe: Recipe, device: torch.device, attn: str | None = None) -> VLM2Vec:
    """The model as `train.build.build_model` would load it, made on `device` from its config alone: weights are drawn at random.

    Args:
        device: four-bit weights are made on the meta device alone.

    Raises:
        ValueError: no config for the recipe's model, or the recipe asks for what the model does not have.
    """
    if recipe.quantization and device.type != "meta":
        raise ValueError(f"quantization {recipe.quantization} of random weights: expected device meta, got {device}")
    source, folder = recipe.model, None
    path = known_config(source)
    if not os.path.isdir(source) and path is not None:
        folder = tempfile.TemporaryDirectory()
        Path(folder.name, "config.json").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    where = source if folder is None else folder.name
    raw = loading.read_json(where, "config.json")
    if raw is None:
        raise ValueError(
            f"{source} has no config.json, and train/plan/configs/ holds none for it; a plan of an adapter names its base model"
        )
    settings = (loading.read_json(where, loading.SETTINGS) or {}) if folder is None else {}
    feeding = feeding_of(raw.get("model_type"), {source: {} if folder is None else None}, settings, recipe.model_options)
    backbone = backbone_for(raw.get("model_type"))
    processing_class = processing_for(backbone, feeding)
    config = backbone.config(where, raw)
    options = {**backbone.options_for(source, raw), **recipe.model_options, "feeding": feeding}
    if folder is None and loading.has_processor(where):
        processing = processing_class.from_folder(where, config, {**saved_options(settings, feeding), **options})
    else:
        processing = processing_class(
            _StandInTokenizer(backbone.marker_ids(config)), backbone.default_image_processor(raw), config, options
        )
    if folder is not None:
        folder.cleanup()
    dtype = getattr(torch, recipe.dtype)
    with device, loading.quiet():
        module = _from_config(backbone.model_class(config), config, dtype)
        if recipe.quantization:
            _quantize(module, backbone.unquantized, dtype)
        model = VLM2Vec(module, backbone, processing, source=source, attn=attn)
        model.base_source = source
        prepare(model, recipe)
        if recipe.quantization:
            _clone_like_peft(model)
    return model


def _to_cpu(model: nn.Module) -> None:
    known: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    plain = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
                    known[id(tensor)] = nn.Parameter(plain, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else plain
                table[name] = known[id(tensor)]


def _from_config(cls: type, config: Any, dtype: torch.dtype) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return cls.from_config(config, dtype=dtype) if cls.__name__.startswith("Auto") else cls(config).to(dtype)
    finally:
        torch.set_default_dtype(before)


class _StandInTokenizer:
    """Knows the ids of the markers of visuals; every other character is one token of no meaning."""

    chat_template = None
    eos_token_id = 0
    all_special_ids: list[int] = []

    def __init__(self, ids: dict[str, int]):
        self._ids = ids

    def convert_tokens_to_ids(self, token):
        return self._ids.get(token, 1) if isinstance(token, str) else [self._ids.get(t, 1) for t in token]

    def __call__(self, text: str, **_) -> dict[str, list[int]]:
        pattern = "(" + "|".join(map(re.escape, self._ids)) + ")" if self._ids else "(?!)"
        parts = re.split(pattern, text)
        return {"input_ids": [id_ for part in parts for id_ in ([self._ids[part]] if part in self._ids else [1] * len(part))]}


# Four bits


class FourBitLinear(nn.Linear):
    """Has the bytes of bitsandbytes' Linear4bit with double quantisation, and does its work: one dequantised weight at a time."""

    def __init__(self, like: nn.Linear, compute: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute = like.in_features, like.out_features, compute
        count = like.weight.numel()
        blocks = -(-count // _BLOCK)
        self.weight = nn.Parameter(torch.empty(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False)
        self.bias = None if like.bias is None else nn.Parameter(like.bias.detach(), requires_grad=False)
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8))
        self.register_buffer("nested_absmax", torch.empty(-(-blocks // _NESTED_BLOCK)))
        self.register_buffer("codes", torch.empty(16 + 256 + 1))
        self.clones = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _FourBitProduct.apply(x.to(self.compute), self.bias, (self.out_features, self.in_features)).to(x.dtype)
        return out.clone() if self.clones else out


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, shape):
        ctx.shape = shape
        return torch.nn.functional.linear(x, _dequantised(shape, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        return torch.matmul(grad, _dequantised(ctx.shape, grad.dtype)), None, None


def _dequantised(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    absmax = torch.empty(-(-shape[0] * shape[1] // _BLOCK))
    weight = torch.empty(shape, dtype=dtype)
    del absmax
    return weight


def _quantize(module: nn.Module, skipped: tuple[str, ...], compute: torch.dtype) -> None:
    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear and not any(part in name for part in skipped):
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, FourBitLinear(child, compute))


def _clone_like_peft(model: VLM2Vec) -> None:
    """PEFT clones what a four-bit layer under an adapter gives."""
    from vlm2vec.checkpoint.adapters import lora_layers

    for layer in lora_layers(model).values():
        if isinstance(layer.get_base_layer(), FourBitLinear):
            layer.get_base_layer().clones = True
