"""Phi-3.5-V as a native module: CLIP tower, HD image embedding, Phi-3 decoder. No remote code.

Parameter names are those of microsoft/Phi-3.5-vision-instruct, so its shards, TIGER-Lab/VLM2Vec-Full and adapters fit as
they are. The decoder layers are transformers' Phi-3 layers (fused qkv_proj and gate_up_proj); ours are the image
embedding, the long-context rope per sample, and norms that keep float64.

Shape letters: B rows, L tokens a row (packed: B = 1), D hidden, V image tokens, C crops, h x w crops of one image.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3PreTrainedModel, Phi3RMSNorm

from vlm2vec.attention import Segments
from vlm2vec.backbones import clip
from vlm2vec.backbones.phi3_v.config import Phi3VConfig


class Phi3VRotary(nn.Module):
    """Rope of the "su" type: one set of frequency factors up to the original context, another beyond.

    The reference picks the set for the whole padded batch; here every sample picks by its own length, as it would alone.
    There are no buffers: frequencies stay fp32 whatever dtype the module is cast to.
    """

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        rope = config.rope_parameters
        head = config.hidden_size // config.num_attention_heads
        self.width = int(head * rope.get("partial_rotary_factor", 1.0))
        self.theta = rope["rope_theta"]
        plain = [1.0] * (self.width // 2)
        self.short = rope.get("short_factor") or plain
        self.long = rope.get("long_factor") or plain
        self.original = rope.get("original_max_position_embeddings", config.original_max_position_embeddings)
        stretch = config.max_position_embeddings / self.original
        scaled = rope.get("rope_type") == "longrope" and stretch > 1
        self.scale = math.sqrt(1 + math.log(stretch) / math.log(self.original)) if scaled else 1.0
        self._frequencies: dict[torch.device, torch.Tensor] = {}

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """(2, width / 2) float32: the short and the long set."""
        if device not in self._frequencies:
            exponents = torch.arange(0, self.width, 2, dtype=torch.int64, device=device).float() / self.width
            factors = torch.tensor([self.short, self.long], dtype=torch.float32, device=device)
            self._frequencies[device] = 1.0 / (factors * self.theta**exponents)
        return self._frequencies[device]

    @torch.no_grad()
    def forward(
        self, position_ids_BL: torch.Tensor, dtype: torch.dtype, long_BL: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, (B, L, width) each, in `dtype`; `long_BL` marks tokens of samples beyond the context."""
        sets = self.frequencies(position_ids_BL.device)
        angle = position_ids_BL[..., None].float()
        angle = angle * sets[0] if long_BL is None else angle * torch.where(long_BL[..., None], sets[1], sets[0])
        angle = torch.cat([angle, angle], dim=-1)
        return (angle.cos() * self.scale).to(dtype), (angle.sin() * self.scale).to(dtype)


class Phi3VRMSNorm(Phi3RMSNorm):
    """Phi-3's norm; in float64 it stays there, so that a double-precision check is one."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != torch.float64:
            return super().forward(hidden_states)
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden_states * scale)


class ClipTower(nn.Module):
    """CLIP under the hub's name `img_processor.vision_model`; gives the patches of the last layer but one."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.vision_model = clip.inner(CLIPVisionModel(config))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(C, 3, crop, crop) -> (C, patches, width)."""
        return clip.hidden_states(self.vision_model, pixels, [-2])[0][:, 1:]


class Phi3VImageEmbedding(nn.Module):
    """Crops -> tokens of the language model: CLIP, 2x2 merge, row separators, projection."""

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        width, hidden = config.vision_config.hidden_size, config.hidden_size
        self.img_processor = ClipTower(config.vision_config)
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, 4 * width))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, 4 * width))
        self.img_projection = nn.Sequential(nn.Linear(4 * width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, crops: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """
        Args:
            crops: (C, 3, crop, crop), for every image its global view and then its h * w crops.
            grids: (h, w) in crops of every image, C = sum of 1 + h * w.

        Returns:
            (V, D): for every image its crops line by line, each line ended by `sub_GN`; `glb_GN`; the global view alike.

        Raises:
            ValueError: `grids` does not add up to the number of crops.
        """
        expected = sum(1 + h * w for h, w in grids)
        if expected != crops.shape[0]:
            raise ValueError(f"phi3_v: {crops.shape[0]} crops given, expected {expected} for grids {grids}")
        patches = self.img_processor(crops)
        rows, at = [], 0
        for h, w in grids:
            overview, parts = patches[at : at + 1], patches[at + 1 : at + 1 + h * w]
            rows += [self._lines(parts, h, w), self.glb_GN[0], self._lines(overview, 1, 1)]
            at += 1 + h * w
        return self.img_projection(torch.cat(rows))

    def _lines(self, patches: torch.Tensor, h: int, w: int) -> torch.Tensor:
        """(h * w, side * side, width) -> (h * side / 2 * (w * side / 2 + 1), 4 * width), raster order of the picture."""
        side, width = math.isqrt(patches.shape[1]), patches.shape[2]
        half = side // 2
        picture = patches.view(h, w, half, 2, half, 2, width).permute(0, 2, 1, 4, 3, 5, 6)
        picture = picture.reshape(h * half, w * half, 4 * width)
        return torch.cat([picture, self.sub_GN[0].expand(h * half, 1, -1)], dim=1).flatten(0, 1)


class Phi3VPreTrainedModel(Phi3PreTrainedModel):
    config_class = Phi3VConfig
    config: Phi3VConfig
    input_modalities = ("image", "text")
    _no_split_modules = ["Phi3DecoderLayer", "CLIPEncoderLayer"]
    _can_record_outputs = None
    # The hub's module holds the token table twice, as embed_tokens and as vision_embed_tokens.wte.
    _keys_to_ignore_on_load_unexpected = [r"vision_embed_tokens\.wte\.weight", r"position_ids$"]


class Phi3VModel(Phi3VPreTrainedModel):
    """Image embedding and decoder, without `lm_head`; only the last hidden state is kept."""

    _keys_to_ignore_on_load_unexpected = [*Phi3VPreTrainedModel._keys_to_ignore_on_load_unexpected, r"^lm_head\."]

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.vision_embed_tokens = Phi3VImageEmbedding(config)
        self.layers = nn.ModuleList([Phi3DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        for layer in self.layers:
            layer.input_layernorm = Phi3VRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            layer.post_attention_layernorm = Phi3VRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm = Phi3VRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Phi3VRotary(config)
        self.gradient_checkpointing = False
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike, state_dict: dict | None = None, **kwargs: Any) -> None:
        """As transformers' own, under the hub's names: everything below `model.`."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        state_dict = {k if k.startswith("model.") else f"model.{k}": v for k, v in state_dict.items()}
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)

    def get_image_features(self, crops: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """(C, 3, crop, crop) pixels -> (V, D) image tokens, see `Phi3VImageEmbedding.forward`."""
        return self.vision_embed_tokens(crops, grids)

    def _long_samples(self, position_ids, attention_mask, segments):
        """(B, L) bool, tokens of samples beyond the original context; None when there are none. No look at device memory
        but for padded rows longer than that."""
        original = self.rotary_emb.original
        if segments is not None:
            if segments.max_length <= original:
                return None
            lengths = segments.cu_seqlens.diff().long()
            return (lengths > original).repeat_interleave(lengths, output_size=segments.total)[None]
        if position_ids.shape[-1] <= original:
            return None
        length = position_ids.amax(dim=-1) + 1
        if attention_mask is not None and attention_mask.dim() == 2:
            length = attention_mask.sum(dim=-1)
        return (length > original)[:, None].expand(position_ids.shape)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        visual_index: torch.LongTensor | None = None,
        segments: Segments | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (B, L) int64, or `inputs_embeds` (B, L, D). Negative ids (the reference's image tokens) are places.
            attention_mask: (B, L), 1 for real tokens; None when nothing is padded. Not read when `segments` are given.
            position_ids: (B, L) int64 or (L,); 0..L-1 when None. Packed samples each start again at 0.
            image_features: (V, D) of `get_image_features`, with
            visual_index: (V,) int64 into the flattened (B * L) tokens; the negative ids in order when None.
            segments: `vlm2vec.attention.Segments` of a packed row (B = 1); reaches every attention call.
            use_cache: accepted and ignored; nothing is ever cached.
            **kwargs: reach every attention call.

        Returns:
            `last_hidden_state` (B, L, D) after the final norm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("phi3_v: expected either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids.clamp_min(0))
        if image_features is not None:
            if visual_index is None:
                visual_index = torch.nonzero(input_ids.reshape(-1) < 0).squeeze(-1)
            if visual_index.shape[0] != image_features.shape[0]:
                raise ValueError(f"phi3_v: {image_features.shape[0]} image features for {visual_index.shape[0]} image tokens")
            flat = inputs_embeds.reshape(-1, inputs_embeds.shape[-1])
            inputs_embeds = flat.index_copy(0, visual_index, image_features.to(flat.dtype)).view_as(inputs_embeds)
        hidden = self.embed_dropout(inputs_embeds)
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)
        position_ids = position_ids.expand(hidden.shape[:2])
        rope = self.rotary_emb(position_ids, hidden.dtype, self._long_samples(position_ids, attention_mask, segments))
        mask = None
        if segments is None:
            mask = create_causal_mask(
                config=self.config, inputs_embeds=hidden, attention_mask=attention_mask, past_key_values=None, position_ids=position_ids
            )
        else:
            kwargs["segments"] = segments
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=rope, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class Phi3VForCausalLM(Phi3VPreTrainedModel):
    """The published layout: `model.*` and `lm_head`. Embedding never calls the head; whole checkpoints load and save."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.LongTensor | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        """Logits (B, L, vocabulary) in float32; arguments as `Phi3VModel.forward`."""
        hidden = self.model(input_ids, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden).float())


AutoModel.register(Phi3VConfig, Phi3VModel, exist_ok=True)
AutoModelForCausalLM.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
