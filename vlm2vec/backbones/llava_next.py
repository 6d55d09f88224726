"""LLaVA-Next (LLaVA-v1.6): the family of VLM2Vec-LLaVa-Next.

Defaults are the reference's: `<image>` for the marker, raw text, positions 0..L-1, PIL's bicubic pixels. An image is cut into
tiles ("anyres"): the whole picture in one tile, then the best-fitting grid; the tokens of padding are dropped and every line of
the grid ends in `image_newline`. Tile counts differ from image to image, so tiles are kept in one row without padding: images
of any sizes share a chunk, which the reference cannot do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from vlm2vec.backbones import clip
from vlm2vec.backbones.base import Backbone, Processing, Visual
from vlm2vec.backbones.pixels import look_up, plain_size
from vlm2vec.inputs import MARKER, Item, as_item
from vlm2vec.media.images import Undecoded
from vlm2vec.packing import Features, PackedBatch

if TYPE_CHECKING:
    from transformers import PretrainedConfig


LONGEST_SIDE = 1344


def image_tokens(width: int, height: int, grid: tuple[int, int], side: int) -> tuple[int, int]:
    """Tokens of the tiled picture: (lines, tokens a line without the newline).

    Args:
        width, height: of the picture in pixels, before tiling.
        grid: (down, across) in tiles.
        side: tokens along one side of a tile.

    The tiled picture keeps its ratio and is centred, so whole lines or columns of the grid hold padding only; as many are
    dropped on either side as fit (rounding as transformers' `unpad_image`, which cuts the features).
    """
    lines, columns = grid[0] * side, grid[1] * side
    if width / height > columns / lines:
        picture_lines = int(round(height * (columns / width), 7))
        lines -= (lines - picture_lines) // 2 * 2
    else:
        picture_columns = int(round(width * (lines / height), 7))
        columns -= (columns - picture_columns) // 2 * 2
    return lines, columns


class LlavaNextProcessing(Processing):
    """Options besides the shared ones:

    resolution: a plain resize before tiling that ignores the aspect ratio, as the reference's option of that name: "high"
        1344 x 1344, "mid" 672 x 672, "low" 128 x 128 or (width, height). None, as there, squashes only images with a side
        above 1344; "native" resizes nothing.
    pixels: "pil" (the reference's) or "torchvision" (faster, up to 0.14 apart per normalised pixel).
    """

    image_marker = "<image>"
    defaults = {"resolution": None, "pixels": "pil"}
    image_limit = "resolution"

    def __init__(self, tokenizer: Any, image_processor: Any, config: PretrainedConfig, options: dict | None = None):
        super().__init__(tokenizer, image_processor, config, options)
        self.resized = plain_size(self.options["resolution"], ("native",))
        if self.options["pixels"] not in ("pil", "torchvision"):
            raise ValueError(f"pixels={self.options['pixels']!r}: expected 'pil' or 'torchvision'")
        self.pinpoints = [list(p) for p in config.image_grid_pinpoints]
        self.tile, self.patch = config.vision_config.image_size, config.vision_config.patch_size
        self.class_token = config.vision_feature_select_strategy != "default"
        self.newline = getattr(config, "use_image_newline_parameter", True)
        token = getattr(config, "image_token_id", None)
        if token is None:
            token = getattr(config, "image_token_index", None)
        if token is not None and token != self.image_token_id:
            raise ValueError(
                f"config.json says that image tokens are {token}, the tokenizer says {self.image_token_id} for "
                f"{self.image_marker!r}; take both from the same folder"
            )

    def hf_processor(self) -> Any:
        """transformers' LlavaNextProcessor of the same tokenizer and image processor."""
        from transformers import LlavaNextProcessor

        return LlavaNextProcessor(
            self.image_processor,
            self.tokenizer,
            patch_size=self.patch,
            vision_feature_select_strategy="full" if self.class_token else "default",
            image_token=self.image_marker,
            num_additional_image_tokens=1,
            chat_template=getattr(self.tokenizer, "chat_template", None),
        )

    @property
    def from_headers(self) -> bool:
        """Where the image processor cuts the tiles that config.json says; torchvision's pixels come as floats."""
        ip, side = self.image_processor, {"height": self.tile, "width": self.tile}
        cut_evenly = all(edge % self.tile == 0 for pinpoint in self.pinpoints for edge in pinpoint)
        same = [list(p) for p in ip.image_grid_pinpoints] == self.pinpoints and dict(ip.crop_size or {}) == side
        return self.options["pixels"] == "pil" and cut_evenly and same and bool(ip.do_center_crop)

    def __call__(self, x: Any) -> Features:
        return super().__call__(self._frames_as_images(as_item(x, self.markers)))

    def measure(self, x: Any) -> Features:
        return super().measure(self._frames_as_images(as_item(x, self.markers)))

    def _frames_as_images(self, item: Item) -> Item:
        """A video is its frames, each an `<image>`."""
        if not item.videos:
            return item
        images, videos = iter(item.images), iter(item.videos)
        shown = []

        def spell(match):
            frames = (
                [self._next(images, "image")]
                if match.group(1) == "image"
                else self.frames(self._next(videos, "video"), lambda frame: frame)
            )
            shown.extend(frames)
            return "".join(f"<|image_{len(shown) - len(frames) + number}|>" for number in range(1, len(frames) + 1))

        text = MARKER.sub(spell, item.text)
        left = len(list(images)) + len(list(videos))
        if left:
            raise ValueError(f"input {item.text[:80]!r} has fewer markers than visuals: {left} are left over; give each its marker")
        return replace(item, text=text, images=shown, videos=[])

    @staticmethod
    def _next(visuals: Iterator, kind: str):
        visual = next(visuals, None)
        if visual is None:
            raise ValueError(f"input has more {kind} markers than {kind}s; give the missing one or take the marker out")
        return visual

    def _resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (width, height) that `resize` makes of an image of this size."""
        if self.resized is not None:
            return self.resized
        giant = self.options["resolution"] is None and max(size) > LONGEST_SIDE
        return (LONGEST_SIDE, LONGEST_SIDE) if giant else size

    def resize(self, image: Any) -> Any:
        """The reference's resize before the processor sees the image (PIL's default filter, bicubic)."""
        size = self._resized_size(image.size)
        return image if size == image.size else image.resize(size)

    def process_image(self, image: Any) -> Visual:
        width, height = self._resized_size(image.size)
        down, across = self._grid(width, height)
        if isinstance(image, Undecoded):
            count, pixels = 1 + down * across, {}
        else:
            pixels = self.image_processor(self.resize(image), return_tensors="pt", do_pad=False)["pixel_values"][0]
            count, pixels = len(pixels), {"pixel_values": pixels}
        tokens = (self.tile // self.patch) ** 2 + self.class_token
        if count > 1:
            lines, columns = image_tokens(width, height, (down, across), self.tile // self.patch)
            tokens += lines * (columns + self.newline)
        else:
            tokens += self.newline
        patches = count * (self.tile // self.patch) ** 2
        return Visual(tokens, {"image_sizes": [(height, width)], "tiles": [count], **pixels}, patches)

    def decode(self, features: Features) -> dict[str, torch.Tensor]:
        parts = []
        for (source,), (height, width) in zip(features.pending, features.vision["image_sizes"], strict=True):
            image = self.resize(self.open(source))
            if image.size != (width, height):
                raise self.not_as_measured(source)
            tiles = self.image_processor(image, return_tensors="pt", do_pad=False, do_rescale=False, do_normalize=False)
            parts.append(tiles["pixel_values"][0])
        return {"pixel_values": torch.cat(parts)}

    def decoded_shape(self, features: Features) -> tuple[int, ...]:
        return sum(features.vision["tiles"]), 3, self.tile, self.tile

    def normalised(self, pixels: torch.Tensor, vision: dict) -> torch.Tensor:
        ip = self.image_processor
        table = np.tile(np.arange(256, dtype=np.uint8), (3, 1, 1))  # a picture of every value goes the way of all pictures
        table = ip.rescale(table, ip.rescale_factor) if ip.do_rescale else table
        table = ip.normalize(table, ip.image_mean, ip.image_std) if ip.do_normalize else table
        return look_up(pixels, torch.from_numpy(table[:, 0].T.astype(np.float32)), torch.empty_like(pixels, dtype=torch.float32))

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """(down, across) in tiles."""
        from transformers.image_processing_utils import select_best_resolution

        best = select_best_resolution((height, width), self.pinpoints)
        return best[0] // self.tile, best[1] // self.tile


class LlavaNext(Backbone):
    name = "llava_next"
    processing_class = LlavaNextProcessing
    architecture = "LlavaNextForConditionalGeneration"
    # As transformers 5 writes them, as it wrote them until 4.52 (language_model.model.), and with CLIP's inner level.
    adapter_renames = [
        (r"^(?:model\.)?language_model\.(?:model\.)?", "language_model."),
        (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower."),
        (r"^model\.", ""),
    ]
    hub_names = [(r"^language_model\.", "language_model.model."), (r"^vision_tower\.", "vision_tower.vision_model.")]
    unused_keys = [r"^lm_head\.", r"^language_model\.lm_head\."]  # the embedding model has no language-model head

    # VLM2Vec-LLaVa-Next was trained and scored on images squashed to 1344 x 1344 (arXiv:2410.05160, Table 2: high resolution)
    published = [(r"(^|/)vlm2vec-llava-next$", {"resolution": "high"})]

    def default_image_processor(self, raw: dict) -> Any:
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        side = raw["vision_config"]["image_size"]
        crop = {"height": side, "width": side}
        return LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=crop, image_grid_pinpoints=raw["image_grid_pinpoints"])

    def vision_tower(self, model: nn.Module) -> nn.Module | None:
        # All that `vision` runs. Frozen features are kept from one pass to the next, so freezing the tower alone would leave
        # a projector that is said to train and never does.
        side = nn.Module()
        side.tower, side.projector, side.newline = model.vision_tower, model.multi_modal_projector, model.image_newline
        return side

    def vision(self, model: nn.Module, packed: PackedBatch) -> torch.Tensor | None:
        v = packed.vision
        if not v:
            return None
        config = model.config
        layers = config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        if not clip.is_clip(model.vision_tower):
            return torch.cat(model.get_image_features(v["pixel_values"].to(model.dtype), v["image_sizes"]).pooler_output)
        states = torch.cat(clip.hidden_states(model.vision_tower, v["pixel_values"], layers), dim=-1)
        if config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        tiles = model.multi_modal_projector(states).split(v["tiles"])
        newline = model.image_newline if getattr(config, "use_image_newline_parameter", True) else None
        features, _ = model.pack_image_features(tiles, v["image_sizes"], config.vision_feature_select_strategy, newline)
        return torch.cat(features)

    def plain_last_layer(self, text: nn.Module, further: dict) -> bool:
        return type(text).__name__ in ("LlamaModel", "MistralModel")

    def no_mask(self, text: nn.Module) -> dict[str, None] | None:
        # Llama's and Mistral's mask makers hand a ready 4-D mask on; packed attention never reads it. Without one they would
        # search the positions for sample boundaries, which waits for the device.
        return torch.zeros(1, 1, 1, 1)
