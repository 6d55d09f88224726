"""Qwen2-VL: the family of VLM2Vec-V2.0 and of the Qwen2VL-2B and -7B adapters.

Defaults are the reference's: bare `<|image_pad|>` without vision start and end tokens, no chat template, 1-D positions for image
and video tokens, images between 3,136 and 1,003,520 pixels, PIL's bicubic. `positions="mrope"` gives the model's own positions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from vlm2vec.attention import Segments
from vlm2vec.backbones.base import Backbone, Processing, Visual, override, patches_as_linear
from vlm2vec.backbones.pixels import look_up, patchify, pixel_table, plain_size, smart_resize
from vlm2vec.media.images import Undecoded
from vlm2vec.packing import Features, PackedBatch

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Qwen2VLProcessing(Processing):
    """Options besides the shared ones:

    min_pixels, max_pixels: limits of the image's area after resizing, also of each video frame.
    positions: "sequential" (1-D, as the reference trained) or "mrope".
    pixels: "pil" (the reference's) or "torchvision" (faster, up to 0.1 apart per normalised pixel).
    resolution: None, "high" 1344 x 1344, "mid" 672 x 672, "low" 128 x 128 or (width, height): a plain resize before the limits.
    """

    image_marker = "<|image_pad|>"
    image_limit = "max_pixels"
    video_marker = "<|video_pad|>"
    reference_edges = True  # tiny and very long images become squares, as in the V2 reference
    defaults = {"min_pixels": 4 * 28 * 28, "max_pixels": 1280 * 28 * 28, "positions": "sequential", "pixels": "pil", "resolution": None}

    def __init__(self, tokenizer: Any, image_processor: Any, config: PretrainedConfig, options: dict | None = None):
        super().__init__(tokenizer, image_processor, config, options)
        vision = config.vision_config
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        self.temporal = vision.temporal_patch_size
        self.factor = self.patch * self.merge
        low, high = self.options["min_pixels"], self.options["max_pixels"]
        if low > high:
            raise ValueError(f"min_pixels={low} is above max_pixels={high}; no image could keep to both")
        self.resized = plain_size(self.options["resolution"])
        for name, allowed in (("positions", ("sequential", "mrope")), ("pixels", ("pil", "torchvision"))):
            if self.options[name] not in allowed:
                raise ValueError(f"{name}={self.options[name]!r}: expected {' or '.join(map(repr, allowed))}")

    def size(self, width: int, height: int, frames: int = 1) -> tuple[int, int]:
        """Target (width, height) of an image."""
        h, w = smart_resize(
            height,
            width,
            factor=self.factor,
            min_pixels=self.options["min_pixels"],
            max_pixels=self.max_pixels(frames),
            reference_edges=self.reference_edges,
        )
        return w, h

    def max_pixels(self, frames: int) -> int:
        """Largest area of an image, or of each frame of a video."""
        return self.options["max_pixels"]

    @property
    def from_headers(self) -> bool:
        return self.options["pixels"] == "pil"

    def _first_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (width, height) that `_first_resize` makes of an image of this size."""
        size = self.resized or size
        return (2 * self.factor, 2 * self.factor) if self.reference_edges and min(size) < self.factor else size

    def _first_resize(self, image):
        """The resizes that the reference makes before the processor sees the image (PIL's default filter, bicubic)."""
        if self.resized is not None:
            image = image.resize(self.resized)
        if self.reference_edges and min(image.size) < self.factor:
            image = image.resize((2 * self.factor, 2 * self.factor))
        return image

    def _patches(self, frames: list):
        """Frames of any size, all brought to the size computed for the first one."""
        size = self.size(*self._first_size(frames[0].size), frames=len(frames))
        if any(isinstance(frame, Undecoded) for frame in frames):
            return None, (-(-len(frames) // self.temporal), size[1] // self.patch, size[0] // self.patch)
        if self.options["pixels"] == "torchvision":
            return self._patches_torchvision([self._first_resize(f) for f in frames], size)
        patches, grid = self._bytes(frames, size)
        return self.normalised(torch.from_numpy(patches), {}), grid

    def _bytes(self, frames: list, size: tuple[int, int]):
        """Frames resized to (width, height) and cut into 8-bit patches; a single frame once, whatever the time step holds."""
        from PIL.Image import Resampling

        frames = [self._first_resize(f) for f in frames]
        pixels = np.stack([np.asarray(f if f.size == size else f.resize(size, Resampling.BICUBIC)) for f in frames])
        return patchify(pixels, patch=self.patch, merge=self.merge, temporal=1 if len(frames) == 1 else self.temporal)

    def decode(self, features: Features) -> dict[str, torch.Tensor]:
        parts, grids = [], features.vision["grid_thw"].tolist()
        for sources, (_, h, w) in zip(features.pending, grids):
            patches, _ = self._bytes([self.open(s) for s in sources], (w * self.patch, h * self.patch))
            parts.append(patches.reshape(len(patches), 3, -1, self.patch**2))
        shown = max(p.shape[2] for p in parts)
        parts = [p if p.shape[2] == shown else np.repeat(p, shown, axis=2) for p in parts]
        return {"pixel_values": torch.from_numpy(np.concatenate(parts).reshape(-1, 3 * shown * self.patch**2))}

    def decoded_shape(self, features: Features) -> tuple[int, ...]:
        shown = self.temporal if any(len(frames) > 1 for frames in features.pending) else 1
        return int(features.vision["grid_thw"].prod(dim=1).sum()), 3 * shown * self.patch**2

    def normalised_shape(self, shape: tuple[int, ...], vision: dict) -> tuple[int, ...]:
        return shape[0], 3 * self.temporal * self.patch**2

    def normalised(self, pixels: torch.Tensor, vision: dict) -> torch.Tensor:
        """(P, 3 * patch**2), a frame shown through the time step, or (P, 3 * temporal * patch**2) -> (P, 3 * temporal * patch**2)."""
        return self._values(pixels, self.temporal)  # one frame is broadcast to all places of its time step

    def normalised_once(self, pixels: torch.Tensor) -> torch.Tensor:
        """As `normalised`, but a picture's patches come without time steps, (P, 3 * patch**2), which `patches_as_linear` takes."""
        return self._values(pixels, pixels.shape[1] // (3 * self.patch**2))

    def _values(self, pixels: torch.Tensor, steps: int) -> torch.Tensor:
        channels = pixels.view(len(pixels), 3, -1, self.patch**2)
        values = torch.empty(len(pixels), 3, steps, self.patch**2, dtype=torch.float32, device=pixels.device)
        return look_up(channels, self.pixel_table(), values).view(len(pixels), -1)

    def pixel_table(self) -> torch.Tensor:
        """(256, 3) float32: the normalised value of each 8-bit value and channel."""
        ip = self.image_processor
        return torch.from_numpy(pixel_table(ip.rescale_factor, tuple(ip.image_mean), tuple(ip.image_std)))

    def _patches_torchvision(self, frames: list, size: tuple[int, int]):
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as tvf

        ip = self.image_processor
        mean, std = ([v / ip.rescale_factor for v in values] for values in (ip.image_mean, ip.image_std))
        video = torch.stack([tvf.pil_to_tensor(f) for f in frames])
        video = tvf.resize(video, [size[1], size[0]], interpolation=InterpolationMode.BICUBIC, antialias=True)
        video = tvf.normalize(video.float(), mean, std).permute(0, 2, 3, 1).numpy()
        if len(frames) == 1:
            video = np.repeat(video, self.temporal, axis=0)
        patches, grid = patchify(video, patch=self.patch, merge=self.merge, temporal=self.temporal)
        return torch.from_numpy(patches), grid

    def _visual(self, frames: list, token_id: int) -> Visual:
        pixels, (t, h, w) = self._patches(frames)
        tokens = t * h * w // self.merge**2
        tensors = {"grid_thw": torch.tensor([[t, h, w]])} | ({} if pixels is None else {"pixel_values": pixels})
        return Visual(tokens, tensors, t * h * w, token_id, (t, h // self.merge, w // self.merge))

    def process_image(self, image: Any) -> Visual:
        return self._visual([image], self.image_token_id)

    def process_video(self, frames: list) -> Visual:
        return self._visual(frames, self.video_token_id)

    def positions(self, input_ids: torch.Tensor, spans: list[tuple[int, tuple | None, int]]) -> torch.Tensor | None:
        if self.options["positions"] == "sequential" or not spans:
            return None
        return mrope_positions(len(input_ids), spans)

    def hf_processor(self) -> Any:
        from transformers import Qwen2VLProcessor, Qwen2VLVideoProcessor

        size = {"shortest_edge": self.options["min_pixels"], "longest_edge": self.options["max_pixels"]}
        self.image_processor.size = size
        video = Qwen2VLVideoProcessor(size=size, patch_size=self.patch, merge_size=self.merge, temporal_patch_size=self.temporal)
        return Qwen2VLProcessor(self.image_processor, self.tokenizer, video, getattr(self.tokenizer, "chat_template", None))


def mrope_positions(length: int, spans: list[tuple[int, tuple, int]]) -> torch.Tensor:
    """M-RoPE positions (3, length): text counts on; a visual's tokens get (time, row, column) from the position reached, and the
    text goes on after the larger of rows and columns (Qwen2-VL, section 2.1).

    Args:
        spans: (first token, (t, h, w) in merged patches, tokens) of each visual, in order. A fourth entry of the grid is the
            position units per time step (Qwen2.5-VL spaces frames by real time), 1 without it.
    """
    parts, at, position = [], 0, 0
    for start, (t, h, w, *step), tokens in spans:
        parts.append(torch.arange(position, position + start - at).expand(3, -1))
        position += start - at
        grid = torch.stack(
            torch.meshgrid((torch.arange(t) * (step[0] if step else 1)).long(), torch.arange(h), torch.arange(w), indexing="ij")
        )
        parts.append(grid.reshape(3, -1) + position)
        at, position = start + tokens, position + max(h, w)
    parts.append(torch.arange(position, position + length - at).expand(3, -1))
    return torch.cat(parts, dim=1)


@lru_cache(maxsize=4096)
def patch_positions(h: int, w: int, merge: int) -> torch.Tensor:
    """(h * w, 2) row and column of each patch, merge blocks contiguous, as the patches are laid out."""
    rows, cols = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    both = torch.stack([rows, cols], dim=-1).view(h // merge, merge, w // merge, merge, 2)
    return both.transpose(1, 2).reshape(h * w, 2)


class Qwen2VL(Backbone):
    name = "qwen2_vl"
    processing_class = Qwen2VLProcessing
    architecture = "Qwen2VLForConditionalGeneration"
    # The public adapters were trained when the text stack was `model.` and the tower `visual.` at the top.
    adapter_renames = [
        (r"^(?:model\.)?visual\.", "visual."),
        (r"^model\.language_model\.", "language_model."),
        (r"^model\.", "language_model."),
    ]
    hub_names = [(r"^language_model\.", "model.")]
    # The reference's V2 scripts score the V1 adapters with `--image_resolution high`: images squashed to 1344 x 1344 first. V2.0 keeps
    # the aspect ratio.
    published = [(r"(^|/)vlm2vec-qwen2vl-[^/]*$", {"resolution": "high"})]

    def finish(self, model: nn.Module) -> None:
        super().finish(model)
        self.merge = model.config.vision_config.spatial_merge_size
        override(self.vision_tower(model).patch_embed, forward=patches_as_linear)

    def position_argument(self, packed: PackedBatch) -> torch.Tensor:
        return packed.position_ids.expand(3, -1)[:, None]

    def shares_prefixes(self, model: nn.Module) -> bool:
        return "sliding_attention" not in (getattr(model.config.get_text_config(), "layer_types", None) or ())

    def plain_last_layer(self, text: nn.Module, further: dict) -> bool:
        return len(further.get("deepstack_visual_embeds") or ()) < len(text.layers)  # Qwen3-VL's are added behind the first layers

    def prepare_vision(self, vision: dict, provider: str) -> dict:
        grids = vision["grid_thw"].tolist()
        frames = [h * w for t, h, w in grids for _ in range(t)]
        segments = Segments.from_lengths(frames, causal=False, provider=provider)
        return {
            "pixel_values": vision["pixel_values"],
            "grid_thw": vision["grid_thw"],
            "segments": segments,
            # What the tower would compute from the grids for itself, on the device and with a wait for it.
            "tower": {
                "position_ids": torch.cat([patch_positions(h, w, self.merge) for t, h, w in grids for _ in range(t)]),
                "cu_seqlens": segments.cu_seqlens,
                "max_seqlen": segments.max_length,
                **self.tower_arguments(vision["grid_thw"], provider),
            },
        }

    def tower_arguments(self, grid_thw: torch.Tensor, provider: str) -> dict:
        """More keyword arguments for the tower, made on the CPU."""
        return {}

    def run_tower(self, model: nn.Module, packed: PackedBatch) -> Any:
        """The tower's output object for the chunk's visuals."""
        v, tower = packed.vision, self.vision_tower(model)
        return tower(v["pixel_values"].to(tower.dtype), grid_thw=v["grid_thw"], segments=v["segments"], **v["tower"])

    def vision(self, model: nn.Module, packed: PackedBatch) -> torch.Tensor | None:
        return self.run_tower(model, packed).pooler_output if packed.vision else None
