"""Qwen2.5-VL: as Qwen2-VL, with windowed attention in most layers of the tower and M-RoPE that counts real time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm2vec.attention import Segments
from vlm2vec.backbones.base import Visual
from vlm2vec.backbones.qwen2_vl import Qwen2VL, Qwen2VLProcessing
from vlm2vec.packing import PackedBatch

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Qwen25VLProcessing(Qwen2VLProcessing):
    """Options besides those of Qwen2-VL:

    seconds_per_step: with positions="mrope", the time between two time steps of a video (two frames each). None takes the
        film's own times, and 1 second for frames whose times nobody knows.
    """

    defaults = {**Qwen2VLProcessing.defaults, "seconds_per_step": None}

    def __init__(self, tokenizer: Any, image_processor: Any, config: PretrainedConfig, options: dict | None = None):
        super().__init__(tokenizer, image_processor, config, options)
        self.tokens_per_second = config.vision_config.tokens_per_second

    def process_video(self, frames: list) -> Visual:
        visual = super().process_video(frames)
        visual.grid = (*visual.grid, self.tokens_per_second * self._step(getattr(frames, "seconds", None)))
        return visual

    def _step(self, seconds: list[float] | None) -> float:
        """Seconds between two time steps."""
        if self.options["seconds_per_step"] is not None:
            return self.options["seconds_per_step"]
        if seconds is None or len(seconds) < 2:
            return 1.0
        return self.temporal * (seconds[-1] - seconds[0]) / (len(seconds) - 1)

    def hf_processor(self) -> Any:
        from transformers import Qwen2_5_VLProcessor

        parts = super().hf_processor()
        return Qwen2_5_VLProcessor(parts.image_processor, parts.tokenizer, parts.video_processor, parts.chat_template)


class Qwen25VL(Qwen2VL):
    name = "qwen2_5_vl"
    processing_class = Qwen25VLProcessing
    architecture = "Qwen2_5_VLForConditionalGeneration"

    def finish(self, model: nn.Module) -> None:
        super().finish(model)
        config = model.config.vision_config
        self.window, self.patch = config.window_size, config.patch_size

    def tower_arguments(self, grid_thw: torch.Tensor, provider: str) -> dict[str, Any]:
        from transformers.vision_utils import get_vision_window_index

        index, boundaries = get_vision_window_index(grid_thw, self.merge, self.window, self.patch)
        windows = Segments.from_lengths(boundaries.diff().tolist(), causal=False, provider=provider)
        return {"window_index": index, "cu_window_seqlens": windows.cu_seqlens, "max_window_seqlen": windows.max_length, "windows": windows}

    def run_tower(self, model: nn.Module, packed: PackedBatch) -> Any:
        v = packed.vision
        windows = v["tower"]["windows"]
        # After the move to the device each Segments must hold the very tensors that the tower hands to its layers.
        arguments = {**v["tower"], "cu_seqlens": v["segments"].cu_seqlens, "cu_window_seqlens": windows.cu_seqlens}
        arguments.pop("windows")
        tower = self.vision_tower(model)
        segments = (v["segments"], windows)
        return tower(v["pixel_values"].to(tower.dtype), grid_thw=v["grid_thw"], segments=segments, **arguments)
