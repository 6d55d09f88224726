"""Phi-3.5-V: the family of VLM2Vec-Full and VLM2Vec-LoRA.

Defaults are the reference's: raw text, num_crops 4 (the paper's and its evaluation scripts'), images never resized before the HD
transform, positions 0..L-1. The text is split at each image marker and every part is tokenised alone, so that a BOS stands
before AND behind an image; the public weights were trained that way. Samples are packed, so no padding side is left to force.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm2vec.backbones.base import Backbone, Processing, Visual
from vlm2vec.backbones.phi3_v.config import Phi3VConfig
from vlm2vec.backbones.phi3_v.images import CLIP_MEAN, CLIP_STD, image_tiles, image_tokens, normalised_views, padded_size
from vlm2vec.backbones.phi3_v.model import Phi3VModel
from vlm2vec.files import write_json
from vlm2vec.inputs import Item
from vlm2vec.media.images import Undecoded
from vlm2vec.packing import Features, PackedBatch

if TYPE_CHECKING:
    from transformers import PretrainedConfig


IMAGE_PLACE = -1  # what the tokenised text holds for an image; never a token of the vocabulary
PREPROCESSOR = "preprocessor_config.json"


class WithImages(str):
    """Text whose markers stand for images; in any other text they are words, and are tokenised as such."""


class Phi3VProcessing(Processing):
    """Options besides the shared ones:

    num_crops: most crops of 336 x 336 pixels that an image may take beside its global view; 4 in the paper and its evaluation,
        16 in the demos. 4 crops are 313 to 781 tokens, 16 are at most 2,557.
    """

    image_marker = "<|image_1|>"
    image_limit = "num_crops"
    from_headers = True
    defaults = {"num_crops": 4}

    def __init__(self, tokenizer: Any, image_processor: Any, config: PretrainedConfig, options: dict | None = None):
        super().__init__(tokenizer, image_processor, config, options)
        self.crop, self.grid = config.crop_size, config.crop_grid
        self.crop_patches = (config.crop_size // config.vision_config.patch_size) ** 2
        self.image_token_id = IMAGE_PLACE
        # The place holder's embedding is overwritten; its id only has to be inside the vocabulary.
        self.filler = 0

    @classmethod
    def from_folder(cls, folder: str, config: PretrainedConfig, options: dict | None = None, **hub: Any) -> Phi3VProcessing:
        from transformers import AutoTokenizer

        from vlm2vec.checkpoint.loading import read_json

        settings = read_json(folder, PREPROCESSOR, **hub) or {}
        return cls(AutoTokenizer.from_pretrained(folder, **hub), settings, config, options)

    def save(self, folder: str) -> None:
        self.tokenizer.save_pretrained(folder)
        settings = {
            "image_processor_type": "Phi3VImageProcessor",
            "processor_class": "Phi3VProcessor",
            "do_convert_rgb": True,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
            "num_img_tokens": self.grid**2,
            **{k: v for k, v in self.image_processor.items() if k != "auto_map"},  # auto_map names the hub's remote code
            "num_crops": self.options["num_crops"],
        }
        write_json(os.path.join(folder, PREPROCESSOR), settings)

    def native_text(self, item: Item) -> tuple[str, list[str]]:
        if item.markers_are_text:
            return self.render(item), []  # no image: the reference tokenises the marker like any text
        text, kinds = super().native_text(item)
        return WithImages(text) if kinds else text, kinds

    def tokenize(self, text: str) -> list[int]:
        parts = text.split(self.image_marker) if isinstance(text, WithImages) else [text]
        first, *others = (self.tokenizer(part, verbose=False)["input_ids"] for part in parts)
        ids = list(first)
        for part in others:
            ids += [IMAGE_PLACE, *part]
        return ids

    def process_image(self, image: Any) -> Visual:
        width, height = padded_size(*image.size, self.options["num_crops"], self.crop)
        vision = {"grids": [(height // self.crop, width // self.crop)]}
        if not isinstance(image, Undecoded):
            vision["pixel_values"] = self.normalised(image_tiles(image, self.options["num_crops"], self.crop), vision)
        crops = 1 + (height // self.crop) * (width // self.crop)
        return Visual(image_tokens(width, height, self.crop, self.grid), vision, crops * self.crop_patches, self.filler)

    def decode(self, features: Features) -> dict[str, torch.Tensor]:
        parts = []
        for (source,), (down, across) in zip(features.pending, features.vision["grids"], strict=True):
            image = self.open(source)
            if padded_size(*image.size, self.options["num_crops"], self.crop) != (across * self.crop, down * self.crop):
                raise self.not_as_measured(source)
            parts.append(image_tiles(image, self.options["num_crops"], self.crop))
        return {"pixel_values": torch.cat(parts)}

    def decoded_shape(self, features: Features) -> tuple[int, ...]:
        return sum(down * across for down, across in features.vision["grids"]), 3, self.crop, self.crop

    def normalised_shape(self, shape: tuple[int, ...], vision: dict) -> tuple[int, ...]:
        return shape[0] + len(vision["grids"]), *shape[1:]

    def normalised(self, pixels: torch.Tensor, vision: dict) -> torch.Tensor:
        mean = tuple(self.image_processor.get("image_mean", CLIP_MEAN))
        std = tuple(self.image_processor.get("image_std", CLIP_STD))
        return normalised_views(pixels, vision["grids"], mean, std)


class Phi3V(Backbone):
    name = "phi3_v"
    sections = ()  # Phi-3.5-V's is flat
    processing_class = Phi3VProcessing
    architecture = "Phi3VForCausalLM"
    adapter_renames = [(r"^model\.", "")]
    unused_keys = [
        r"^lm_head\.",  # the embedding model has no language-model head
        r"vision_embed_tokens\.wte\.weight$",  # the token table once more, under the image embedding's own name for it
        r"\.position_ids$",  # a buffer of old CLIP modules, 0, 1, 2, ...
    ]

    def config(self, source: str, raw: dict, **hub: Any) -> Phi3VConfig:
        return Phi3VConfig.from_pretrained(source, **hub)

    def default_image_processor(self, raw: dict) -> Any:
        return {}

    def model_class(self, config: PretrainedConfig) -> type:
        return Phi3VModel

    def text_model(self, model: nn.Module) -> nn.Module:
        return model

    def vision_tower(self, model: nn.Module) -> nn.Module | None:
        return model.vision_embed_tokens

    def vision(self, model: nn.Module, packed: PackedBatch) -> torch.Tensor | None:
        if not packed.vision:
            return None
        return model.get_image_features(packed.vision["pixel_values"], packed.vision["grids"])

    def no_mask(self, text: nn.Module) -> dict[str, None] | None:
        return None
