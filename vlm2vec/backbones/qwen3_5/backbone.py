"""Qwen3.5's rules: Qwen2-VL's tower and names, position tables as Qwen3-VL's, and layers that carry state from token to token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm2vec.backbones.base import override
from vlm2vec.backbones.qwen2_vl import Qwen2VL
from vlm2vec.backbones.qwen3_5 import layers
from vlm2vec.backbones.qwen3_5.layout import stateful
from vlm2vec.backbones.qwen3_5.processing import Qwen35Processing
from vlm2vec.packing import Features, PackedBatch


class Qwen35(Qwen2VL):
    """Positions go to the decoder by hand, so the module's `rope_deltas`, which transformers carries from call to call, stay unused."""

    name = "qwen3_5"
    processing_class = Qwen35Processing
    architecture = "Qwen3_5ForConditionalGeneration"
    hub_names = [(r"^", "model.")]
    unused_keys = [
        r"^lm_head\.",  # the embedding model has no language-model head
        r"^(model\.)?mtp\.",  # nor the layers that predict a second token
    ]

    def finish(self, model: nn.Module) -> None:
        from transformers.models.qwen3_5 import modeling_qwen3_5 as stock

        super().finish(model)
        tower, text = self.vision_tower(model), model.config.get_text_config()
        self.grid_side = tower.num_grid_per_side
        self.interpolation = {"mode": tower.interpolation_mode, "align_corners": tower.interpolation_align_corners}
        self.state = {
            "key_heads": text.linear_num_key_heads,
            "value_heads": text.linear_num_value_heads,
            "width": text.linear_key_head_dim,
            "kernel": text.linear_conv_kernel_dim,
        }
        methods = {
            stock.Qwen3_5GatedDeltaNet: layers.mix,
            stock.Qwen3_5RMSNorm: layers.rms_norm,
            stock.Qwen3_5RMSNormGated: layers.gated_norm,
            stock.Qwen3_5VisionAttention: layers.see,
        }
        for module in model.modules():
            if type(module) in methods:
                override(module, forward=methods[type(module)])
        override(self.text_model(model).layers[-1], forward=layers.end)

    def pack(self, features: list[Features], provider: str = "sdpa") -> PackedBatch:
        packed = super().pack(features, provider)
        packed.segments = stateful(packed.segments, **self.state)
        return packed

    def last_hidden(self, model: nn.Module, packed: PackedBatch, features: torch.Tensor | None) -> torch.Tensor:
        out = self.text_model(model)(
            inputs_embeds=self.embed(model, packed, features)[None],
            position_ids=self.position_argument(packed),
            attention_mask=self.no_mask(self.text_model(model)),
            use_cache=False,
            segments=packed.segments,
        )
        return out.last_hidden_state[0]  # the last layer gives the samples' last rows alone, and the norm has no others

    def tower_arguments(self, grid_thw: torch.Tensor, provider: str) -> dict[str, Any]:
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        indices, weights = get_vision_interpolation_indices_and_weights(
            grid_thw, num_grid_per_side=self.grid_side, spatial_merge_size=self.merge, **self.interpolation
        )
        return {"interp_indices": indices, "interp_weights": weights}

    def shares_prefixes(self, model: nn.Module) -> bool:
        return False  # layers carry a state

    def plain_last_layer(self, text: nn.Module, further: dict[str, Any]) -> bool:
        return False  # `layers.end` has been given to the layer itself

    def no_mask(self, text: nn.Module) -> dict[str, None] | None:
        return dict.fromkeys(("full_attention", "linear_attention"))
