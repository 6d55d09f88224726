"""Raw inputs for Qwen3.5, VLM2Vec's way: bare markers, the model's own M-RoPE positions, a film as one run of tokens a time step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm2vec.backbones.base import Visual
from vlm2vec.backbones.qwen2_vl import Qwen2VLProcessing
from vlm2vec.backbones.qwen3_vl import Qwen3VLProcessing
from vlm2vec.inputs import Item

if TYPE_CHECKING:
    from transformers import PretrainedConfig


START, END = "<|vision_start|>", "<|vision_end|>"
PLACE = "\ue000"  # a letter of nobody's, in no template


class Qwen35Processing(Qwen2VLProcessing):
    """Options besides those of Qwen2-VL:

    chat_template: True feeds the model's own chat template, with the instruction, where given, as the system message, markers around
        every picture and a time stamp before every time step of a film.
    video_min_pixels, video_max_pixels, video_total_pixels: area of a frame, and the share that all frames have of a total.
    video_fps: frames per second of a video that is given as a list or folder of frames, for its time stamps; a film file has its own.
    """

    reference_edges = False
    defaults = Qwen3VLProcessing.defaults

    def __init__(self, tokenizer: Any, image_processor: Any, config: PretrainedConfig, options: dict | None = None):
        super().__init__(tokenizer, image_processor, config, options)
        if self.options["chat_template"]:
            self.kept_ids = frozenset([*tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids([START, END])])
            # A text that is too long is cut before the template's closing, on whose last token the embedding stands.
            self.tail = len(self.tokenize(self.render(Item(PLACE)).rpartition(PLACE)[2]))

    def render(self, item: Item) -> str:
        if not self.options["chat_template"]:
            return super().render(item)
        text = item.text.replace("|>\n", "|>") if item.markers_added else item.text
        messages = [{"role": "user", "content": text}]
        if item.instruction:
            messages.insert(0, {"role": "system", "content": item.instruction})
        if getattr(self.tokenizer, "chat_template", None) is None:
            return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _marker(self, kind: str) -> str:
        marker = super()._marker(kind)
        # A film brings start and end tokens of its own, one pair for each time step.
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
        run = (h * w, (1, h, w))  # a row of the grid for each time step: the time is said in the text, not in the positions
        if not self.options["chat_template"]:
            visual.pieces = [run] * t
            return visual
        times = list(getattr(frames, "seconds", None) or (i / self.options["video_fps"] for i in range(len(frames))))
        times += times[-1:] * (-len(times) % self.temporal)
        visual.pieces = []
        for step in range(0, t * self.temporal, self.temporal):
            said = f"<{(times[step] + times[step + self.temporal - 1]) / 2:.1f} seconds>{START}"
            visual.pieces += [*self._ids(said), run, *self._ids(END)]
        return visual

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _visual(self, frames: list, token_id: int) -> Visual:
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
