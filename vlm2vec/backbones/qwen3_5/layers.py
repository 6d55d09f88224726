"""What a packed batch asks of transformers' Qwen3.5 modules: methods that take their places, on the same weights.

Without `segments` every module is transformers' own. float32 inside of norms and rotations is theirs too, but a float64 model stays
in float64, so that gradients can be compared as exactly as it counts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlm2vec.attention import Segments, packed_attention
from vlm2vec.backbones.qwen3_5 import providers
from vlm2vec.backbones.qwen3_5.convolution import causal_convolution
from vlm2vec.backbones.qwen3_5.delta_rule import gated_delta_rule


def mix(self: nn.Module, hidden_states: torch.Tensor, *args: Any, segments: Segments | None = None, **kwargs: Any) -> torch.Tensor:
    """`forward` of a gated delta net: (1, T, D) -> (1, T, D), convolution and state beginning anew with every sample."""
    if segments is None:
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

        return Qwen3_5GatedDeltaNet.forward(self, hidden_states, *args, **kwargs)
    hidden = hidden_states[0]
    mixed = self.in_proj_qkv(hidden)
    gate, beta, decay = self.in_proj_z(hidden), self.in_proj_b(hidden).sigmoid(), self.in_proj_a(hidden)
    wide = torch.promote_types(decay.dtype, torch.float32)  # exp(A_log) overflows float16
    decay = -self.A_log.to(wide).exp() * F.softplus(decay.to(wide) + self.dt_bias)
    convolve = providers.convolution(segments, mixed, self.conv_kernel_size) or causal_convolution
    mixed = convolve(mixed, self.conv1d.weight.squeeze(1), self.conv1d.bias, segments.layout["convolution"])
    query, key, value = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
    query, key = (x.unflatten(-1, (self.num_k_heads, self.head_k_dim)) for x in (query, key))
    value = value.unflatten(-1, (self.num_v_heads, self.head_v_dim))
    rule = providers.delta_rule(segments, query, value) or gated_delta_rule
    out = rule(query, key, value, decay, beta, segments.layout["delta"])
    out = self.norm(out.flatten(0, 1), gate.view(-1, self.head_v_dim))
    return self.out_proj(out.view(1, len(hidden), -1))


def end(self: nn.Module, hidden_states: torch.Tensor, *args: Any, segments: Segments | None = None, **kwargs: Any) -> torch.Tensor:
    """`forward` of the last decoder layer: (1, T, D) -> (1, B, D), the rows of the samples' last tokens, which alone are asked for."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

    if segments is None:
        return Qwen3_5DecoderLayer.forward(self, hidden_states, *args, **kwargs)
    normed = self.input_layernorm(hidden_states)
    if self.block_type == "linear_attention":
        mixed = self.linear_attn(normed, *args, segments=segments, **kwargs)
    else:
        mixed, _ = self.self_attn(normed, *args, segments=segments, **kwargs)
    last = segments.cu_seqlens[1:].long() - 1
    hidden = hidden_states.index_select(1, last) + mixed.index_select(1, last)
    return hidden + self.mlp(self.post_attention_layernorm(hidden))


def rms_norm(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`forward` of the RMSNorm whose weight is an offset from 1."""
    if x.dtype != torch.float64:
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

        return Qwen3_5RMSNorm.forward(self, x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def gated_norm(self: nn.Module, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`forward` of the RMSNorm that SiLU(gate) multiplies."""
    if hidden_states.dtype != torch.float64:
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

        return Qwen3_5RMSNormGated.forward(self, hidden_states, gate)
    scale = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (hidden_states * scale) * F.silu(gate)


def see(self: nn.Module, hidden_states: torch.Tensor, *args: Any, segments: Segments | None = None, **kwargs: Any) -> torch.Tensor:
    """`forward` of the tower's attention, (P, D) -> (P, D); ours in float64 alone, where theirs rotates in float32."""
    if hidden_states.dtype != torch.float64 or segments is None:
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionAttention

        given = {} if segments is None else {"segments": segments}
        return Qwen3_5VisionAttention.forward(self, hidden_states, *args, **given, **kwargs)
    query, key, value = self.qkv(hidden_states).view(len(hidden_states), 3, self.num_heads, -1).unbind(1)
    cos, sin = (x[:, None].double() for x in kwargs["position_embeddings"])
    query, key = (x * cos + _quarter_turn(x) * sin for x in (query, key))
    return self.proj(packed_attention(query, key, value, segments, scale=self.scaling).flatten(1))


def _quarter_turn(x: torch.Tensor) -> torch.Tensor:
    """Each pair (i, i + half) of the last dimension turned by 90 degrees."""
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)
