"""Qwen3.5's module for WeMM-Embedding, one sample at a time: a stand-in until the family has a packed file of its own.

Where `vlm2vec.backbones.FAMILIES` has a line for the family it is not used: delete it then, and what names it beside `AUTHORS`.
"""

from __future__ import annotations

import torch
from torch import nn

from vlm2vec.backbones.base import Backbone
from vlm2vec.backbones.qwen3_vl import Qwen3VLProcessing
from vlm2vec.packing import PackedBatch


class OneByOne(Backbone):
    name = "qwen3_5"
    processing_class = Qwen3VLProcessing
    packs = False
    adapter_renames = [(r"^model\.", "")]
    architecture = "Qwen3_5ForConditionalGeneration"
    unused_keys = [r"^lm_head\.", r"^mtp\."]  # the embedding model has neither language-model head nor multi-token prediction

    def finish(self, model: nn.Module) -> None:
        """The module keeps the attention that transformers chose for it."""

    def vision(self, model: nn.Module, packed: PackedBatch) -> torch.Tensor | None:
        if not packed.vision:
            return None
        tower = self.vision_tower(model)
        return tower(packed.vision["pixel_values"].to(tower.dtype), grid_thw=packed.vision["grid_thw"]).pooler_output

    def last_hidden(self, model: nn.Module, packed: PackedBatch, features: torch.Tensor | None) -> torch.Tensor:
        text, embeds = self.text_model(model), self.embed(model, packed, features)
        positions = packed.position_ids.expand(3, -1)
        rows = zip(embeds.split(packed.seqlens), positions.split(packed.seqlens, dim=1))
        out = [text(inputs_embeds=e[None], position_ids=p[:, None], use_cache=False).last_hidden_state[0, -1] for e, p in rows]
        return torch.stack(out)
