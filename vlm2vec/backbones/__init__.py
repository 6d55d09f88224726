"""The registry of backbone families, and of the published embedders that are fed in a way of their own; nothing else names a family."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm2vec.backbones.base import Backbone
    from vlm2vec.backbones.processing import Processing


# model_type in config.json -> where its Backbone class lives
FAMILIES = {
    "qwen2_5_vl": "vlm2vec.backbones.qwen2_5_vl:Qwen25VL",
    "qwen3_vl": "vlm2vec.backbones.qwen3_vl:Qwen3VL",
    "qwen3_5": "vlm2vec.backbones.qwen3_5:Qwen35",
    "llava_next": "vlm2vec.backbones.llava_next:LlavaNext",
    "phi3_v": "vlm2vec.backbones.phi3_v:Phi3V",
    "qwen2_vl": "vlm2vec.backbones.qwen2_vl:Qwen2VL",
}


@dataclass(frozen=True)
class Embedder:
    """A published embedder of a family, which its authors feed in their own way (`vlm2vec.backbones.authors`), and what tells it.

    Attributes:
        processing: where its `Processing` lives.
        names: pattern of its names on the hub, in lower case.
        modules: pattern of a type in sentence-transformers' modules.json that tells it, where there is one.
        token: a token of its vocabulary that its base does not have.
    """

    processing: str
    names: str
    modules: str | None = None
    token: str | None = None


# model_type in config.json -> the embedder that feeding="authors" means
AUTHORS = {
    "qwen3_vl": Embedder(
        "vlm2vec.backbones.authors.qwen3_vl_embedding:Qwen3VLEmbeddingProcessing",
        names=r"qwen3[-_]vl[-_]embedding",
        modules=r"sentence_transformers\.",  # stock modules: none write them beside vlm2vec.json, which decides before them
    ),
    "qwen3_5": Embedder("vlm2vec.backbones.authors.wemm:WeMMProcessing", names=r"wemm[-_]embedding", token="<embedding>"),
}
FEEDINGS = ("raw", "authors")
EXAMPLE = "Qwen/Qwen2-VL-2B-Instruct"  # a hub name to show in messages


def backbone_for(model_type: str | None) -> Backbone:
    """The Backbone for a `model_type` of config.json; families without a line take the generic path.

    Raises:
        ValueError: no model type, or one that neither the registry nor transformers' AutoModelForImageTextToText knows.
    """
    if model_type is None:
        raise ValueError("config.json has no model_type; is this the folder of a vision-language model?")
    return _found(FAMILIES.get(model_type, "vlm2vec.backbones.generic:Generic"))()


def processing_for(backbone: Backbone, feeding: str = "raw") -> type[Processing]:
    """The family's `Processing` for a feeding.

    Raises:
        ValueError: an unknown feeding, or "authors" of a family without a published embedder of that kind.
    """
    if feeding == "raw":
        return backbone.processing_class
    if feeding not in FEEDINGS:
        raise ValueError(f"feeding={feeding!r}: expected {' or '.join(map(repr, FEEDINGS))}")
    if backbone.name not in AUTHORS:
        raise ValueError(
            f"feeding='authors' of family {backbone.name}: expected one of {', '.join(AUTHORS)}, whose embedders are fed so; leave it out"
        )
    return _found(AUTHORS[backbone.name].processing)


def _found(path: str) -> type:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
