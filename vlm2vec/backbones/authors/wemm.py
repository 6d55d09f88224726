"""WeMM-Embedding as its authors feed it (Tencent/WeMM-Embedding, examples/transformers_inference.py; mmeb_v3_eval for cuts).

One user's message with media and texts in the caller's order, without default instruction or answer; the tokenizer puts `<embedding>`
behind it, at which the embedding stands. Its tokenizer.json also takes one newline away before a special token, before another
newline and at the end, which transformers' class for the family forgets: the file is read as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm2vec.backbones.authors import resizing
from vlm2vec.backbones.authors.feeding import AuthorsProcessing, parts_of
from vlm2vec.backbones.authors.films import Film
from vlm2vec.backbones.base import Visual
from vlm2vec.checkpoint.loading import read_json
from vlm2vec.inputs import Item

if TYPE_CHECKING:
    from transformers import PretrainedConfig


EMBEDDING = "<embedding>"
EDGES = ("shortest_edge", "longest_edge")  # what processors call their least and most pixels
PICTURE_LIMITS = (64 * 32**2, 16384 * 32**2)  # of the processor, where its file says none
FILM_LIMITS = (4 * 32**2, 24576 * 32**2)  # of all frames together


class WeMMProcessing(AuthorsProcessing):
    """Options as in `AuthorsProcessing`, with the defaults of Qwen's tools: two frames a second, 4 to 768. Pictures and films are
    resized again to the limits of the folder's processor files. `max_length` cuts texts alone, never an input with media."""

    defaults = {**AuthorsProcessing.defaults, "fps": 2.0, "max_frames": 768}
    opens_answer = False
    film_frames = "fps:1,max:64,clips:8,rounded"  # mmeb_v3_eval's, which the published scores come from
    text_tokens = 2048
    film_limits = FILM_LIMITS

    def __init__(self, tokenizer: Any, image_processor: Any, config: PretrainedConfig, options: dict | None = None):
        super().__init__(tokenizer, image_processor, config, options)
        size = dict(getattr(image_processor, "size", None) or {})
        self.picture_limits = tuple(size.get(name) or limit for name, limit in zip(EDGES, PICTURE_LIMITS))
        last = self.tokenize("a")[-1]
        if last != tokenizer.convert_tokens_to_ids(EMBEDDING):
            raise ValueError(f"expected a tokenizer that puts {EMBEDDING} behind every text, got token {last}; copy tokenizer.json again")

    @classmethod
    def from_folder(cls, folder: str, config: PretrainedConfig, options: dict | None = None, **hub: Any) -> WeMMProcessing:
        from transformers import AutoImageProcessor, PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **hub)
        made = cls(tokenizer, AutoImageProcessor.from_pretrained(folder, backend="pil", **hub), config, options)
        nested = (read_json(folder, "processor_config.json", **hub) or {}).get("video_processor")
        size = (nested or read_json(folder, "video_preprocessor_config.json", **hub) or {}).get("size") or {}
        made.film_limits = tuple(size.get(name) or limit for name, limit in zip(EDGES, FILM_LIMITS))
        return made

    @property
    def prompt_is_instruction(self) -> bool:
        return False  # there is no place for one: it goes before the text

    def messages(self, item: Item) -> list[tuple[str, str]]:
        parts, said = parts_of(item), (item.instruction or "").strip()
        if said and not item.system:
            at = next((at for at, (kind, _) in enumerate(parts) if kind == "text"), len(parts))
            text = "".join(text for kind, text in parts[at : at + 1])
            parts[at : at + 1] = [("text", f"{said}\n{text}" if text else said)]
        content = "".join(text for _, text in parts).strip()
        return [*([("system", said)] if said and item.system else []), ("user", content)]

    def _limit(self, pieces: list) -> int | None:
        return None if any(isinstance(piece, Visual) for piece in pieces) else super()._limit(pieces)

    def _most_listed(self) -> int | None:
        return None  # Qwen's tools take a list as it is

    def _decodes_later(self, item: Item) -> bool:
        return not item.videos  # a film that the processor resizes again is no bytes

    def picture_sizes(self, size: tuple[int, int], settings: dict) -> list[tuple[int, int]]:
        sizes = super().picture_sizes(size, settings)
        again = resizing.bounded(*sizes[0], self.factor, *self.picture_limits)
        return sizes if again == sizes[0] else [*sizes, again]

    def film_sizes(self, film: Film, settings: dict) -> tuple[list, list[tuple[int, int]]]:
        frames, sizes = super().film_sizes(film, settings)
        return frames, [*sizes, resizing.film_again(sizes[0], len(frames), self.factor, self.film_limits)]

    def hf_processor(self) -> Any:
        from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

        sizes = {"patch_size": self.patch, "merge_size": self.merge, "temporal_patch_size": self.temporal}
        video = Qwen3VLVideoProcessor(size=dict(zip(EDGES, self.film_limits)), **sizes)
        return Qwen3VLProcessor(self.image_processor, self.tokenizer, video, getattr(self.tokenizer, "chat_template", None))

    @property
    def stock_modules(self) -> bool:
        return False
