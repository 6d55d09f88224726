"""The registry of backbone families: one line each, nothing else names a family."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm2vec.backbones.base import Backbone


# model_type in config.json -> where its Backbone class lives
FAMILIES = {
    "qwen2_5_vl": "vlm2vec.backbones.qwen2_5_vl:Qwen25VL",
    "qwen3_vl": "vlm2vec.backbones.qwen3_vl:Qwen3VL",
    "qwen3_5": "vlm2vec.backbones.qwen3_5:Qwen35",
    "llava_next": "vlm2vec.backbones.llava_next:LlavaNext",
    "phi3_v": "vlm2vec.backbones.phi3_v:Phi3V",
    "qwen2_vl": "vlm2vec.backbones.qwen2_vl:Qwen2VL",
}
EXAMPLE = "Qwen/Qwen2-VL-2B-Instruct"  # a hub name to show in messages


def backbone_for(model_type: str | None) -> Backbone:
    """The Backbone for a `model_type` of config.json; families without a line take the generic path.

    Raises:
        ValueError: no model type, or one that neither the registry nor transformers' AutoModelForImageTextToText knows.
    """
    if model_type is None:
        raise ValueError("config.json has no model_type; is this the folder of a vision-language model?")
    path = FAMILIES.get(model_type, "vlm2vec.backbones.generic:Generic")
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)()
