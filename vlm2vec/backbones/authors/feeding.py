"""What the published embedders share: a chat template around the input, media in its text, sizes by limits, cuts at the end."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlm2vec.backbones.authors import resizing
from vlm2vec.backbones.authors.films import Film, listed, opened, read_film, stamps
from vlm2vec.backbones.authors.truncation import cut, length_of
from vlm2vec.backbones.base import Visual
from vlm2vec.backbones.literals import swap
from vlm2vec.backbones.pixels import patchify
from vlm2vec.backbones.qwen3_vl import END, START, Qwen3VLProcessing
from vlm2vec.checkpoint.loading import read_json
from vlm2vec.inputs import MARKER, Item
from vlm2vec.media.images import Undecoded
from vlm2vec.packing import Features

if TYPE_CHECKING:
    from transformers import PretrainedConfig


NEVER = re.compile(r"(?!)")
FRAME_MIN_PIXELS, FRAME_MAX_PIXELS = 128 * 32**2, 768 * 32**2  # of a film's frame, in Qwen's tools
TOTAL_PIXELS = 128_000 * 32**2 * 9 // 10  # of a film, there


class AuthorsProcessing(Qwen3VLProcessing):
    """Options besides the shared ones, under the authors' own names where they have one:

    min_pixels, max_pixels: area of a picture after resizing.
    video_min_pixels, video_max_pixels: area of a film's frame. total_pixels, file_total_pixels: of which two frames share a film's
        that is given as frames, and as a file.
    fps, max_frames: frames a second of a film file, and at most so many. video_fps: frames a second of a list that does not say it.
    max_length: most tokens.

    One picture or film may say other ones for itself (`vlm2vec.inputs.SETTINGS`).
    """

    feeding = "authors"
    takes_settings = True
    defaults = {
        **{name: value for name, value in Qwen3VLProcessing.defaults.items() if name != "video_total_pixels"},
        "feeding": "authors",
        "chat_template": True,
        "min_pixels": resizing.LEAST_TOKENS * 32**2,
        "max_pixels": resizing.MOST_TOKENS * 32**2,
        "video_min_pixels": FRAME_MIN_PIXELS,
        "video_max_pixels": FRAME_MAX_PIXELS,
        "total_pixels": TOTAL_PIXELS,
        "file_total_pixels": TOTAL_PIXELS,
    }
    opens_answer = True  # the template ends with the opening of an answer

    def __init__(self, tokenizer: Any, image_processor: Any, config: PretrainedConfig, options: dict | None = None):
        super().__init__(tokenizer, image_processor, config, options)
        for name, wanted in (("chat_template", True), ("resolution", None), ("append_eos", False)):
            if self.options[name] != wanted:
                raise ValueError(
                    f"{name}={self.options[name]!r}: expected {wanted!r} with feeding='authors'; leave it out, or say feeding='raw'"
                )

    def _keep_template(self) -> None:
        """What the tokenizer puts behind every text stays behind a cut one."""
        self.tail = len(self._literals.ends()[1])

    @classmethod
    def from_folder(cls, folder: str, config: PretrainedConfig, options: dict | None = None, **hub: Any) -> AuthorsProcessing:
        made = super().from_folder(folder, config, options, **hub)
        if made.tokenizer.chat_template is None:  # older repositories have it beside
            made.tokenizer.chat_template = (read_json(folder, "chat_template.json", **hub) or {}).get("chat_template")
        return made

    @property
    def prompts(self) -> dict[str, str]:
        return {}

    # -- the text -------------------------------------------------------------------------------------------------------

    def messages(self, item: Item) -> list[tuple[str, str]]:
        """(role, content) of each message, MMEB's markers where the media stand."""
        raise NotImplementedError

    def render(self, item: Item) -> str:
        messages = self.messages(item)
        if self.tokenizer.chat_template is None:
            text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
            return text + ("<|im_start|>assistant\n" if self.opens_answer else "")
        parts = [{"role": role, "content": [{"type": "text", "text": content}]} for role, content in messages]
        return self.tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=self.opens_answer)

    def _features(self, item: Item, open_one: Callable[[Any], Any]) -> tuple[Features, list[list]]:
        if item.turns > 1:
            raise ValueError(f"expected one message of a user beside the system's, got {item.turns}; join them")
        text = self.render(item)
        kinds = [found.group(1) for found in MARKER.finditer(text)]
        self._check(item, kinds)
        given = {
            "image": iter(zip(item.images, self._settings(item, "image"))),
            "video": iter(zip(item.videos, self._settings(item, "video"))),
        }
        frames, runs, places = [], [], []
        for kind in kinds if item.visuals else ():
            source, settings = next(given[kind])
            frames.append([open_one(source)] if kind == "image" else opened(self.film(source, settings), open_one))
            visual = self._picture(frames[-1][0], settings) if kind == "image" else self._film(frames[-1], settings)
            marker = f"{START}{self.image_marker if kind == 'image' else self.video_marker}{END}"
            places.append(marker if kind == "image" else "".join(stamp + marker for stamp in stamps(frames[-1])))
            runs += [visual] if kind == "image" else self._steps(visual)
        place = iter(places)
        text = swap(text, MARKER if item.visuals else NEVER, lambda _: next(place), tuple(self.markers))
        return self.assemble(self.tokenize(text), runs), frames

    @staticmethod
    def _settings(item: Item, kind: str) -> list[dict]:
        return item.settings.get(kind) or [{}] * len(item.images if kind == "image" else item.videos)

    def _truncate(self, pieces: list, kept_ids: frozenset | None = None) -> list:
        limit, total = self._limit(pieces), length_of(pieces)
        if limit is None or total <= limit:
            return pieces
        named = self._named(limit)
        kept = cut(
            pieces, limit, self.tail, named=named, mend="raise max_length, or lower max_pixels, fps, max_frames or file_total_pixels"
        )
        fixed = sum(piece.length for piece in pieces if isinstance(piece, Visual)) + self.tail
        self._count_cut(named, total - fixed, fixed, limit - fixed)
        return kept

    def _limit(self, pieces: list) -> int | None:
        """Most tokens of an input. Positions run slower than tokens where there are media, and bound texts alone."""
        bare = not any(isinstance(piece, Visual) for piece in pieces)
        limits = [self.max_length, *([self.positions_limit, self.options["text_max_length"]] if bare else [])]
        return min((limit for limit in limits if limit is not None), default=None)

    # -- media ----------------------------------------------------------------------------------------------------------

    def measure(self, x: Any) -> Features:
        item = self.item(x)
        return self(item) if item.settings or not self._decodes_later(item) else super().measure(item)

    def _decodes_later(self, item: Item) -> bool:
        """Whether `decode` can make the item's media of their files alone, as bytes."""
        return True

    def film(self, video: Any, settings: dict | None = None) -> Film:
        """The frames of a film that the options and its own settings choose."""
        o, settings = self.options, {"sample_fps": self.options["video_fps"], **(settings or {})}
        return read_film(
            video, fps=o["fps"], frames=o["frames"], max_frames=o["max_frames"], most_listed=self._most_listed(), settings=settings
        )

    def _most_listed(self) -> int | None:
        """Most frames of a list or folder; None for all."""
        return self.options["max_frames"]

    def frames(self, video: Any, open_one: Callable[[Any], Any] | None = None) -> Film:
        return opened(self.film(video), open_one or self.open)

    def process_image(self, image: Any) -> Visual:
        return self._picture(image, {})

    def process_video(self, frames: list) -> Visual:
        film = frames if isinstance(frames, Film) else listed(frames, None, {"sample_fps": self.options["video_fps"]})
        visual = self._film(film, {})
        visual.pieces = []
        for stamp, run in zip(stamps(film), self._steps(visual)):
            visual.pieces += [*self._ids(stamp + START), (run.tokens, run.grid), *self._ids(END)]
        return visual

    def picture_sizes(self, size: tuple[int, int], settings: dict) -> list[tuple[int, int]]:
        """(width, height) after each of a picture's resizes."""
        limits = {"min_pixels": self.options["min_pixels"], "max_pixels": self.options["max_pixels"], **settings}
        return [resizing.picture_size(size, self.factor, limits)]

    def film_sizes(self, film: Film, settings: dict) -> tuple[list, list[tuple[int, int]]]:
        """(frames after the resize of those that were given one by one, (width, height) after each of the film's further resizes)."""
        o, frames = self.options, list(film)
        if film.listed:
            limits = {name: settings[name] for name in ("min_pixels", "max_pixels") if name in settings}
            frames = [resizing.by_pil(f, resizing.picture_size(f.size, 2 * self.factor, limits)) for f in frames]
        odd = next((at for at, frame in enumerate(frames) if frame.size != frames[0].size), None)
        if odd is not None:
            raise ValueError(
                f"frames of one film: expected one size, got {film[0].size} first and {film[odd].size} at {odd}; resize them to one size"
            )
        size = resizing.frame_size(
            frames[0].size,
            len(frames),
            self.factor,
            min_pixels=settings.get("min_pixels", o["video_min_pixels"]),
            most=o["video_max_pixels"],
            total_pixels=settings.get("total_pixels", o["total_pixels" if film.listed else "file_total_pixels"]),
            max_pixels=settings.get("max_pixels"),
        )
        return frames, [size]

    def _picture(self, image: Any, settings: dict) -> Visual:
        sizes = self.picture_sizes(image.size, settings)
        pixels = None if isinstance(image, Undecoded) else self._resized(image, sizes)[None]
        return self._cut(pixels, 1, sizes[-1], self.image_token_id)

    def _film(self, film: Film, settings: dict) -> Visual:
        frames, sizes = self.film_sizes(film, settings)
        pixels = None if any(isinstance(f, Undecoded) for f in frames) else self._resized_film(frames, sizes)
        return self._cut(pixels, len(frames), sizes[-1], self.video_token_id)

    def _resized(self, image: Any, sizes: list[tuple[int, int]]) -> np.ndarray:
        """(H, W, 3) uint8 of an RGB picture after its resizes."""
        if self.options["pixels"] == "pil":
            pixels, rest = resizing.as_bytes(resizing.by_pil(image, sizes[0])), sizes[1:]
        else:
            pixels, rest = resizing.as_bytes(image), sizes
        for size in rest:
            pixels = resizing.picture_by_torchvision(pixels, size)
        return pixels

    def _resized_film(self, frames: list, sizes: list[tuple[int, int]]) -> np.ndarray:
        """(F, H, W, 3) uint8 of RGB frames of one size after their resizes; float32 where a processor resizes once more."""
        pixels = resizing.film_by_torchvision([resizing.as_bytes(f) for f in frames], sizes[0])
        return pixels if len(sizes) == 1 or sizes[1] == sizes[0] else resizing.floats_by_torchvision(pixels, sizes[1])

    def _cut(self, pixels: np.ndarray | None, frames: int, size: tuple[int, int], token_id: int) -> Visual:
        """A `Visual` of a picture's or film's pixels, without pieces; of (width, height) alone where they are not decoded."""
        grid = (-(-frames // self.temporal), size[1] // self.patch, size[0] // self.patch)
        tensors = {"grid_thw": torch.tensor([grid])}
        if pixels is not None:
            patches, _ = patchify(pixels, patch=self.patch, merge=self.merge, temporal=1 if frames == 1 else self.temporal)
            tensors["pixel_values"] = (
                self._floats(patches) if patches.dtype == np.float32 else self.normalised(torch.from_numpy(patches), {})
            )
        t, h, w = grid[0], grid[1] // self.merge, grid[2] // self.merge
        return Visual(t * h * w, tensors, grid[0] * grid[1] * grid[2], token_id, (t, h, w))

    def pixel_table(self) -> torch.Tensor:
        return self._normalised(torch.arange(256, dtype=torch.float32).view(1, 1, 256).expand(1, 3, -1))[0].T.contiguous()

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """(P, 3, ...) float32 values from 0 to 255 as transformers' torchvision processors normalise them: in one step."""
        ip = self.image_processor
        mean, std = (torch.tensor(v).float().view(1, 3, 1) * (1.0 / ip.rescale_factor) for v in (ip.image_mean, ip.image_std))
        return (pixels - mean) / std

    def _floats(self, patches: np.ndarray) -> torch.Tensor:
        """Normalised values of pixels that are no bytes, (P, 3 * temporal * patch**2)."""
        return self._normalised(torch.from_numpy(patches).view(len(patches), 3, -1)).view(len(patches), -1)

    @staticmethod
    def _steps(visual: Visual) -> list[Visual]:
        """A film's time steps as visuals of their own, of which the first holds all tensors."""
        t, h, w = visual.grid
        first = Visual(h * w, visual.tensors, visual.patches, visual.token_id, (1, h, w))
        return [first, *(Visual(h * w, {}, 0, visual.token_id, (1, h, w)) for _ in range(t - 1))]

    def _bytes(self, frames: list, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int, int]]:
        """8-bit patches of a picture, or of a film's frames that were given one by one, by the options alone; `decode` asks for them."""
        if len(frames) == 1:
            sizes = self.picture_sizes(frames[0].size, {})
            pixels = self._resized(frames[0], sizes)[None]
        else:
            some, sizes = self.film_sizes(Film(frames), {})
            pixels = self._resized_film(some, sizes)
        if sizes[-1] != size:
            raise self.not_as_measured(frames[0])
        return patchify(pixels, patch=self.patch, merge=self.merge, temporal=1 if len(frames) == 1 else self.temporal)


def parts_of(item: Item) -> list[tuple[str, str]]:
    """(kind, text) of an item's media and texts in their order: a marker, or a text. A text behind the caller's own
    markers is stripped, as the authors' evaluations strip MMEB's; others are left alone."""
    if not item.visuals:
        return [("text", item.text)]
    parts, at, head = [], 0, True
    for found in MARKER.finditer(item.text):
        between = item.text[at : found.start()]
        if between and not (head and not between.strip() and not item.markers_added):
            parts.append(("text", between))
            head = False
        parts.append((found.group(1), found.group(0)))
        at = found.end()
        if item.markers_added:
            at += item.text[at : at + 1] == "\n"
    rest = item.text[at:]
    if head and not item.markers_added:
        rest = rest.strip()
    return [*parts, ("text", rest)] if rest else parts
