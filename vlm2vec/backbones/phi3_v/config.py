"""Configuration of Phi-3.5-V (`model_type: phi3_v`), as microsoft/Phi-3.5-vision-instruct publishes it.

The hub's file says nothing about the CLIP tower: its remote code fixes ViT-L/14 at 336 pixels. Here the tower is
`vision_config`, with that size as the default; a folder whose tower has another size writes `vision_config` into
config.json or lays a `clip_vision_config.json` beside it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, Phi3Config

# openai/clip-vit-large-patch14-336, the tower of every published Phi-3-vision and Phi-3.5-vision checkpoint.
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
VISION_FILE = "clip_vision_config.json"


class Phi3VConfig(Phi3Config):
    """Phi-3 decoder settings plus the image side.

    Args:
        vision_config: CLIP tower (dict or CLIPVisionConfig); None means CLIP ViT-L/14-336.
        img_processor: the hub's block; `image_dim_out` must equal the tower's hidden size.
        embd_layer: the hub's block; only the published layout (HD transform, `sub_glb`, separators, MLP) exists.
        **kwargs: those of `Phi3Config`; `rope_scaling` may be of type "su" (the hub's word) or "longrope".

    Raises:
        ValueError: tower and `image_dim_out` disagree, or `embd_layer` asks for another image layout.
    """

    model_type = "phi3_v"
    sub_configs = {"vision_config": CLIPVisionConfig}

    def __init__(
        self,
        vision_config: CLIPVisionConfig | dict | None = None,
        img_processor: dict | None = None,
        embd_layer: dict | None = None,
        **kwargs: Any,
    ):
        if vision_config is None:
            vision_config = CLIP_L_336
        if isinstance(vision_config, dict):
            known = {k: v for k, v in vision_config.items() if k != "model_type"}
            vision_config = CLIPVisionConfig(**known)
        self.vision_config = vision_config
        self.img_processor = dict(img_processor or {"image_dim_out": vision_config.hidden_size, "num_img_tokens": 144})
        self.embd_layer = dict(embd_layer or {})
        kwargs.pop("auto_map", None)  # names the hub's remote code, which is never run here
        kwargs.setdefault("max_position_embeddings", 131072)
        kwargs.setdefault("original_max_position_embeddings", 4096)
        scaling = kwargs.pop("rope_scaling", None) or kwargs.pop("rope_parameters", None)
        if scaling:
            kwargs["rope_parameters"] = _longrope(scaling, kwargs)
        super().__init__(**kwargs)
        # The hub writes 262,144, twice the longest position: no mask ever reaches it, and a plain causal mask is cheaper.
        if self.sliding_window is not None and self.sliding_window >= self.max_position_embeddings:
            self.sliding_window = None
        self._check()

    def _check(self):
        width = self.img_processor.get("image_dim_out", self.vision_config.hidden_size)
        if width != self.vision_config.hidden_size:
            raise ValueError(
                f"phi3_v: img_processor.image_dim_out is {width} but the CLIP tower is {self.vision_config.hidden_size} "
                f"wide; write the tower's own sizes as vision_config in config.json or as {VISION_FILE} beside it"
            )
        published = {
            "use_hd_transform": True,
            "with_learnable_separator": True,
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "embedding_cls": "image",
        }
        for name, value in published.items():
            if self.embd_layer.get(name, value) != value:
                raise ValueError(
                    f"phi3_v: embd_layer.{name} is {self.embd_layer[name]!r}, expected {value!r}, the only layout that "
                    "Phi-3-vision and Phi-3.5-vision checkpoints were published with"
                )
        if not isinstance(self.vision_config.image_size, int) or not isinstance(self.vision_config.patch_size, int):
            raise ValueError("phi3_v: vision_config.image_size and patch_size must be one integer each")
        if (self.vision_config.image_size // self.vision_config.patch_size) % 2:
            raise ValueError(
                f"phi3_v: the CLIP grid has {self.vision_config.image_size // self.vision_config.patch_size} patches a "
                "side, expected an even number: patches are merged two by two"
            )

    @property
    def crop_size(self) -> int:
        """Side of one crop in pixels."""
        return self.vision_config.image_size

    @property
    def crop_grid(self) -> int:
        """Image tokens along one side of a crop, after the 2x2 merge (12 for 336 pixels)."""
        return self.vision_config.image_size // self.vision_config.patch_size // 2

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Phi3VConfig:
        folder = kwargs.get("name_or_path") or config_dict.get("_name_or_path")
        if "vision_config" not in config_dict and folder:
            path = os.path.join(str(folder), VISION_FILE)
            if os.path.isfile(path):
                with open(path, encoding="utf-8") as file:
                    config_dict = {**config_dict, "vision_config": json.load(file)}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Phi3VConfig:
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)


def _longrope(scaling: dict, settings: dict) -> dict:
    """The hub's `rope_scaling` ("su", theta beside it) in the words of transformers 5 ("longrope", all in one place)."""
    scaling = dict(scaling)
    kind = scaling.pop("type", None) or scaling.get("rope_type")
    if kind not in ("su", "longrope", "default"):
        raise ValueError(f"phi3_v: rope scaling of type {kind!r}, expected 'su' (or its newer name 'longrope')")
    scaling["rope_type"] = "longrope" if kind == "su" else kind
    scaling.setdefault("rope_theta", settings.pop("rope_theta", 10000.0))
    if kind != "default":
        scaling.setdefault("original_max_position_embeddings", settings["original_max_position_embeddings"])
        longest = settings["max_position_embeddings"]
        scaling.setdefault("factor", longest / scaling["original_max_position_embeddings"])
        width = settings.get("hidden_size", 3072) // settings.get("num_attention_heads", 32) // 2
        for name in ("short_factor", "long_factor"):
            if len(scaling.get(name) or ()) != width:
                raise ValueError(f"phi3_v: rope {name} has {len(scaling.get(name) or ())} numbers, expected {width}, half a head")
    return scaling


AutoConfig.register("phi3_v", Phi3VConfig, exist_ok=True)
