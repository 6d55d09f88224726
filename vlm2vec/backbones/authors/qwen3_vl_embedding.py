"""Qwen3-VL-Embedding as its authors' embedder feeds it (QwenLM/Qwen3-VL-Embedding, src/models/qwen3_vl_embedding.py).

The instruction is the system message, "Represent the user's input." where there is none; the user's message holds films, then
pictures, then texts, whatever the caller's order, and "NULL" where nothing was given. The embedding stands at the last token, which
the tokenizer puts behind the template and a cut keeps.
"""

from __future__ import annotations

from typing import Any

from vlm2vec.backbones.authors.feeding import AuthorsProcessing, parts_of
from vlm2vec.backbones.qwen3_vl import EMPTY, INSTRUCTION, instruction_of
from vlm2vec.inputs import MODALITIES, Item

ORDER = MODALITIES[::-1]  # films, pictures, texts
FRAME = 768 * 32**2


class Qwen3VLEmbeddingProcessing(AuthorsProcessing):
    """Options as in `AuthorsProcessing`, with the embedder's own defaults: 4 to 1,800 tokens a picture, a frame a second, at most 64,
    8,192 tokens; `total_pixels` bounds films that are given as frames alone, as in the authors' code."""

    defaults = {
        **AuthorsProcessing.defaults,
        "max_pixels": 1800 * 32**2,
        "total_pixels": 10 * FRAME,
        "fps": 1.0,
        "max_frames": 64,
        "max_length": 8192,
    }
    film_frames = "fps:1,max:64"  # scripts/evaluation/mmeb_v2: whole films and clips alike

    @property
    def prompts(self) -> dict[str, str]:
        return {"query": INSTRUCTION, "document": INSTRUCTION}

    @property
    def prompt_is_instruction(self) -> bool:
        return True

    def messages(self, item: Item) -> list[tuple[str, str]]:
        parts = sorted(parts_of(item), key=lambda part: ORDER.index(part[0]))  # stable: each kind keeps its order
        return [("system", instruction_of(item)), ("user", EMPTY if item.nothing else "".join(text for _, text in parts))]

    def hf_processor(self) -> Any:
        from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

        o = self.options
        self.image_processor.size = {"shortest_edge": o["min_pixels"], "longest_edge": o["max_pixels"]}
        video = Qwen3VLVideoProcessor(
            size={"shortest_edge": o["video_min_pixels"], "longest_edge": o["total_pixels"]},
            patch_size=self.patch,
            merge_size=self.merge,
            temporal_patch_size=self.temporal,
        )
        return Qwen3VLProcessor(self.image_processor, self.tokenizer, video, getattr(self.tokenizer, "chat_template", None))
