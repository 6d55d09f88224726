"""Qwen3-VL and Qwen3-VL-Embedding: M-RoPE, deepstack features in the first layers, timestamps between the frames of a video.

A base model takes raw text, as every family here, or its chat template (`chat_template=True`). Qwen3-VL-Embedding is fed as its
authors feed it: `vlm2vec.backbones.authors`.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm2vec.backbones.base import Visual, override
from vlm2vec.backbones.qwen2_vl import Qwen2VL, Qwen2VLProcessing
from vlm2vec.inputs import Item
from vlm2vec.packing import PackedBatch

if TYPE_CHECKING:
    from transformers import PretrainedConfig


INSTRUCTION = "Represent the user's input."
FACTOR = 32
EMPTY = "NULL"  # what an empty content is fed as
START, END = "<|vision_start|>", "<|vision_end|>"


def instruction_of(item: Item) -> str:
    """An input's instruction as the system message holds it: stripped, with a full stop where it ends without punctuation."""
    said = (item.instruction or "").strip() or INSTRUCTION
    return said if unicodedata.category(said[-1]).startswith("P") else f"{said}."


class Qwen3VLProcessing(Qwen2VLProcessing):
    """Options besides those of Qwen2-VL:

    chat_template: True feeds system instruction, user content and the opening of the answer.
    video_min_pixels, video_max_pixels, video_total_pixels: area of a frame, and the share that all frames have of a total.
    video_fps: frames per second of a video that is given as a list or folder of frames, for its timestamps; a film file has its own.
    """

    reference_edges = False
    text_tokens = 8192
    defaults = {
        **Qwen2VLProcessing.defaults,
        "min_pixels": 64 * FACTOR**2,
        "max_pixels": 16384 * FACTOR**2,
        "positions": "mrope",
        "chat_template": False,
        "video_min_pixels": 4 * FACTOR**2,
        "video_max_pixels": 768 * FACTOR**2,
        "video_total_pixels": 7680 * FACTOR**2,
        "video_fps": 2.0,
    }

    def __init__(self, tokenizer: Any, image_processor: Any, config: PretrainedConfig, options: dict | None = None):
        super().__init__(tokenizer, image_processor, config, options)
        if self.options["chat_template"]:
            self._keep_template()

    def _keep_template(self) -> None:
        """A text that is too long is cut before the template's closing, on whose last token the embedding stands."""
        self.kept_ids = frozenset([*self.tokenizer.all_special_ids, *self.tokenizer.convert_tokens_to_ids([START, END])])
        self.tail = len(self.tokenize(self.render(Item()).rpartition(EMPTY)[2]))

    @property
    def prompts(self) -> dict[str, str]:
        return {"query": INSTRUCTION, "document": INSTRUCTION} if self.options["chat_template"] else {}

    def render(self, item: Item) -> str:
        if not self.options["chat_template"]:
            return super().render(item)
        text = item.text
        if item.markers_added:
            text = text.replace("|>\n", "|>")
        messages = [{"role": "system", "content": instruction_of(item)}, {"role": "user", "content": text or EMPTY}]
        if self.tokenizer.chat_template is None:
            return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _marker(self, kind):
        marker = super()._marker(kind)
        # A video brings start and end tokens of its own, one pair for each time step.
        return f"{START}{marker}{END}" if self.options["chat_template"] and kind == "image" else marker

    def max_pixels(self, frames: int) -> int:
        o = self.options
        if frames == 1:
            return o["max_pixels"]
        share = o["video_total_pixels"] * self.temporal // frames
        return max(min(o["video_max_pixels"], share), int(o["video_min_pixels"] * 1.05))

    def process_video(self, frames: list) -> Visual:
        visual = super().process_video(frames)
        t, h, w = visual.grid
        if not self.options["chat_template"]:
            visual.pieces = [(h * w, (1, h, w))] * t
            return visual
        times = list(getattr(frames, "seconds", None) or (i / self.options["video_fps"] for i in range(len(frames))))
        times += times[-1:] * (-len(times) % self.temporal)
        visual.pieces = []
        for step in range(t):
            first, last = times[step * self.temporal], times[(step + 1) * self.temporal - 1]
            visual.pieces += self._ids(f"<{(first + last) / 2:.1f} seconds>{START}")
            visual.pieces.append((h * w, (1, h, w)))
            visual.pieces += self._ids(END)
        return visual

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _visual(self, frames, token_id) -> Visual:
        return super()._visual(frames if len(frames) != 1 or token_id == self.image_token_id else frames * 2, token_id)

    def hf_processor(self) -> Any:
        from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

        o = self.options
        self.image_processor.size = {"shortest_edge": o["min_pixels"], "longest_edge": o["max_pixels"]}
        video = Qwen3VLVideoProcessor(
            size={"shortest_edge": o["video_min_pixels"], "longest_edge": o["video_total_pixels"]},
            patch_size=self.patch,
            merge_size=self.merge,
            temporal_patch_size=self.temporal,
        )
        return Qwen3VLProcessor(self.image_processor, self.tokenizer, video, getattr(self.tokenizer, "chat_template", None))


def add_deepstack(self, hidden: torch.Tensor, index: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Add features at the visual tokens by index: a mask would wait for the device to count its tokens."""
    if index.dtype == torch.bool:  # transformers' own call, on rows that are not packed
        index, shape = index.flatten().nonzero().squeeze(-1), hidden.shape
        return hidden.flatten(0, 1).index_add(0, index, features.to(hidden.dtype)).view(shape)
    return hidden.index_add(1, index, features[None].to(hidden.dtype))


class Qwen3VL(Qwen2VL):
    name = "qwen3_vl"
    processing_class = Qwen3VLProcessing
    architecture = "Qwen3VLForConditionalGeneration"
    hub_names = [(r"^", "model.")]

    def finish(self, model: nn.Module) -> None:
        super().finish(model)
        tower = self.vision_tower(model)
        self.grid_side = tower.num_grid_per_side
        self.interpolation = {"mode": tower.interpolation_mode, "align_corners": tower.interpolation_align_corners}
        override(model.language_model, _deepstack_process=add_deepstack)

    def tower_arguments(self, grid_thw: torch.Tensor, provider: str) -> dict[str, Any]:
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        indices, weights = get_vision_interpolation_indices_and_weights(
            grid_thw, num_grid_per_side=self.grid_side, spatial_merge_size=self.merge, **self.interpolation
        )
        return {"interp_indices": indices, "interp_weights": weights}

    def vision_width(self, config: PretrainedConfig) -> int:
        return self.embedding_dim(config) * (1 + len(config.vision_config.deepstack_visual_indexes))

    def vision(self, model: nn.Module, packed: PackedBatch) -> torch.Tensor | None:
        """(V, D * (1 + deepstack layers)): the features and, beside them, those for the decoder's first layers."""
        if not packed.vision:
            return None
        out = self.run_tower(model, packed)
        return torch.cat([out.pooler_output, *out.deepstack_features], dim=-1)

    def embed(self, model: nn.Module, packed: PackedBatch, features: torch.Tensor | None) -> torch.Tensor:
        return super().embed(model, packed, None if features is None else features[:, : self.embedding_dim(model.config)])

    def text_kwargs(self, model: nn.Module, packed: PackedBatch, features: torch.Tensor | None) -> dict[str, Any]:
        if features is None:
            return {}
        _, *deep = features.split(self.embedding_dim(model.config), dim=-1)
        return {"visual_pos_masks": packed.visual_index, "deepstack_visual_embeds": list(deep)}

    def no_mask(self, text: nn.Module) -> dict[str, None] | None:
        return None
