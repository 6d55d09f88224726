"""From an input to `Features`, on the CPU: what families share of it, and the hooks in which they differ."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from vlm2vec.backbones.literals import LiteralTokenizer, WithLiterals, swap
from vlm2vec.backbones.options import check_option
from vlm2vec.backbones.visual import Visual
from vlm2vec.checkpoint.prompts import LAYOUTS, layout
from vlm2vec.inputs import MARKER, Item, as_item
from vlm2vec.media.films import Frames, read_frames
from vlm2vec.media.images import BACKGROUNDS, ORIENTATIONS, Undecoded, measure_picture, open_picture
from vlm2vec.media.sampling import FRAMES
from vlm2vec.media.sources import image_name
from vlm2vec.packing import Features, concat_vision

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# options that change what is read, not how it is fed
READING = ("orientation", "background", "frames", "fps", "max_frames", "text_max_length")


class Processing:
    """Tokenizer, image processor and the family's rules. Families override the hooks; `__call__` is the same for all.

    Class attributes of a family:
        image_marker, video_marker: the text that stands for a visual in this family's vocabulary (None: not supported).
        audio_marker: the text that stands for a sound, likewise.
        from_headers: `process_image` and `process_video` also take `vlm2vec.media.images.Undecoded`, and the four methods are there
            by which media are streamed: `decode`, `decoded_shape`, `normalised`, `normalised_shape`.
        defaults: the family's options and their default values; other option names are an error.
        image_limit: the option that bounds the tokens of a picture.
        feeding: "raw" (the text as it is) or "authors" (as a published embedder is fed); one `Processing` does one of them.
        film_frames: which frames of a film the family's own evaluation takes (`vlm2vec.media.sampling.FrameRule`).
        text_tokens: most tokens of an input without media in VLM2Vec's evaluation of MMEB-V3.
        takes_settings: reads what an input says of one picture or film alone (`Item.settings`); without it such inputs are refused.

    Options that every family has:
        orientation: "exif" turns pictures as the camera says, as people see them; "stored" leaves them as the reference reads them.
        background: what stands under transparent pixels: "white" paper, as people see it, or the "hidden" colour that the file
            stores there, as the reference reads it. MMEB's protocols are scored with "stored" and "hidden" (`vlm2vec.evaluation`).
        frames: how many frames are taken of a film, spread evenly.
        fps: frames a second of a film file instead (`vlm2vec.media.sampling`). max_frames: at most so many of any film.
        max_length: most tokens of an input; never more than the model has positions.
        text_max_length: the same of an input without media, where that has a limit of its own.
        truncation: True cuts longer texts, with a warning that counts them; False refuses them.
        max_image_pixels: largest width * height of a file that is decoded.
        layout: how instruction and text are laid out (`vlm2vec.checkpoint.prompts`).
        append_eos: end with the end token.
        feeding: as the class says; another one is another class (`vlm2vec.backbones.processing_for`).
    """

    image_marker: str | None = None
    video_marker: str | None = None
    audio_marker: str | None = None
    from_headers = False
    defaults: dict = {}
    image_limit = "max_image_pixels"
    feeding = "raw"
    takes_settings = False
    film_frames = str(FRAMES)
    text_tokens = 2048
    shared_defaults = {
        "feeding": "raw",
        "max_length": None,
        "text_max_length": None,
        "truncation": True,
        "layout": "image",
        "frames": FRAMES,
        "fps": None,
        "max_frames": None,
        "max_image_pixels": None,
        "append_eos": False,
        "orientation": "exif",
        "background": "white",
    }
    allowed = {"layout": LAYOUTS, "orientation": ORIENTATIONS, "background": BACKGROUNDS}

    def __init__(self, tokenizer: Any, image_processor: Any, config: PretrainedConfig, options: dict | None = None):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        options = dict(options or {})
        known = {**self.shared_defaults, **self.defaults}
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"unknown options {unknown} for {type(self).__name__}; it has {', '.join(sorted(known))}")
        self.options = {**known, **options}
        for name, default in known.items():
            check_option(name, self.options[name], default)
        self._check_names()
        self.max_length = self.options["max_length"]
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.positions_limit = getattr(text_config, "max_position_embeddings", None)
        self.truncated = 0
        self._literals = LiteralTokenizer(tokenizer)
        self.kept_ids: frozenset = frozenset()  # text tokens that shortening leaves in place
        self.tail = int(self.options["append_eos"])  # last tokens that shortening leaves in place
        self.image_token_id = None if self.image_marker is None else tokenizer.convert_tokens_to_ids(self.image_marker)
        self.video_token_id = None if self.video_marker is None else tokenizer.convert_tokens_to_ids(self.video_marker)

    def _check_names(self) -> None:
        if self.options["feeding"] != self.feeding:
            raise ValueError(f"feeding={self.options['feeding']!r}: expected {self.feeding!r}, which is what {type(self).__name__} does")
        for name, values in self.allowed.items():
            if self.options[name] not in values:
                raise ValueError(f"{name}={self.options[name]!r}: expected {' or '.join(map(repr, values))}")

    # -- hooks ----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_folder(cls, folder: str, config: PretrainedConfig, options: dict | None = None, **hub: Any) -> Processing:
        """Read tokenizer and image processor from a model folder or hub name."""
        from transformers import AutoImageProcessor, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, **hub)
        backend = "torchvision" if (options or {}).get("pixels") == "torchvision" else "pil"
        return cls(tokenizer, AutoImageProcessor.from_pretrained(folder, backend=backend, **hub), config, options)

    def save(self, folder: str) -> None:
        """Write tokenizer and processor files so that transformers' AutoProcessor reads the folder.

        preprocessor_config.json is for releases of transformers, and servers with them, that look for nothing newer.
        """
        processor = self.hf_processor()
        (self.tokenizer if processor is None else processor).save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    @property
    def prompts(self) -> dict[str, str]:
        """Named prompts that the family brings; "query" and "document" are used by encode_query and encode_document."""
        return {}

    @property
    def markers(self) -> dict[str, str]:
        """The texts that stand for a visual in this family's vocabulary, and the kind of each."""
        pairs = ((self.video_marker, "video"), (self.image_marker, "image"))
        return {marker: kind for marker, kind in pairs if marker is not None and not MARKER.fullmatch(marker)}

    @property
    def prompt_is_instruction(self) -> bool:
        """Whether a prompt goes where the chat template holds an instruction, and not before the text."""
        return bool(self.options.get("chat_template"))

    @property
    def stock_modules(self) -> bool:
        """Whether sentence-transformers' own modules compute the model: its own positions, behind a chat template."""
        return self.options.get("positions") == "mrope" and bool(self.options.get("chat_template"))

    def hf_processor(self) -> Any:
        """transformers' own processor object, None when there is none."""
        return None

    def process_image(self, image: Any) -> Visual:
        """One RGB PIL image -> its inputs for the vision tower."""
        raise ValueError(f"{type(self).__name__} takes no images")

    def process_video(self, frames: list) -> Visual:
        """RGB PIL frames of one video -> its inputs for the vision tower; `frames.seconds` says when each is shown, where that is known."""
        raise ValueError(f"{type(self).__name__} takes no videos; give its frames as images")

    def positions(self, input_ids: torch.Tensor, spans: list[tuple[int, tuple | None, int]]) -> torch.Tensor | None:
        """Position ids (L,) or (3, L); None for 0..L-1. `spans` holds (first token, grid, tokens) of each visual run."""
        return None

    def tokenize(self, text: str) -> list[int]:
        """Ids of the text with each visual still one marker token."""
        ids = self._literals.tokenize(text) if isinstance(text, WithLiterals) else self.tokenizer(text, verbose=False)["input_ids"]
        return ids + [self.tokenizer.eos_token_id] if self.options["append_eos"] else ids

    def render(self, item: Item) -> str:
        """The item's text with its instruction, still with MMEB's markers. Default: the layouts of `vlm2vec.checkpoint.prompts`."""
        return item.text if item.instruction is None else layout(item.instruction, item.text, self.options["layout"])

    # -- shared ---------------------------------------------------------------------------------------------------------

    def native_text(self, item: Item) -> tuple[str, list[str]]:
        """Swap MMEB's markers for the family's own; returns the text and the kinds of the visuals in their order.

        The family's own markers in the caller's text are text: a text that holds any comes back as `literals.WithLiterals`.
        """
        text = self.render(item)
        kinds = [found.group(1) for found in MARKER.finditer(text)]
        swapped = swap(text, MARKER, lambda found: self._marker(found.group(1)), tuple(self.markers))
        self._check(item, kinds)
        return swapped, kinds

    def _marker(self, kind: str) -> str:
        marker = self.image_marker if kind == "image" else self.video_marker
        if marker is None:
            raise ValueError(f"{type(self).__name__} takes no {kind}s")
        return marker

    def _check(self, item: Item, kinds: list[str]) -> None:
        if item.markers_are_text or not (kinds or item.visuals):
            return
        for kind, given in (("image", len(item.images)), ("video", len(item.videos))):
            if kinds.count(kind) != given and (self.image_marker != self.video_marker):
                mend = (
                    'give the missing one, take the marker out, or say "image": None to feed the marker as an ordinary token'
                    if kinds.count(kind) > given
                    else f"put one <|{kind}_1|>, <|{kind}_2|>, ... in the text for each, or none at all"
                )
                raise ValueError(f"input {item.text[:80]!r} has {kinds.count(kind)} {kind} markers and {given} {kind}s; {mend}")

    def __call__(self, x: Any) -> Features:
        """One input -> `Features`. Thread- and process-safe but for the counter of shortened texts.

        Raises:
            ValueError: names what is wrong with the input and the mend.
        """
        return self._features(self.item(x), self.open)[0]

    def item(self, x: Any) -> Item:
        """An input in one form. ValueError also for one that asks of a picture or film what only another feeding reads."""
        item = as_item(x, self.markers)
        if item.sounds and self.audio_marker is None:
            raise ValueError(
                f"{type(self).__name__} takes no audio; a model that hears is one that transformers knows with an audio encoder"
            )
        if item.settings and not self.takes_settings:
            said = next(name for each in item.settings.values() for settings in each for name in settings)
            raise ValueError(
                f"{said} of one picture or film: expected an option of the model, from_pretrained(..., {said}=...), with feeding='raw'"
            )
        return item

    def measure(self, x: Any) -> Features:
        """As `__call__`, but where the family knows a visual's tokens from its size, image files are not decoded.

        Only their headers are read; the files are named in `Features.pending`. An input with visuals that must be seen (a
        video file, a PIL image) comes back whole, as do all inputs of a family that cannot tell.
        """
        item = self.item(x)
        if self.from_headers and item.visuals and not item.markers_are_text:
            features, opened = self._features(item, self._measured)
            if all(isinstance(frame, Undecoded) for frames in opened for frame in frames):
                features.pending = [[frame.source for frame in frames] for frames in opened]
                return features
        return self(item)

    def decode(self, features: Features) -> dict:
        """`{"pixel_values": ...}`, which `features` that `measure` gave still lack: 8-bit pixels of `decoded_shape`, on the CPU.

        Raises:
            ValueError: an image is damaged, or not what its header said.
        """
        raise self._not_measured()

    def decoded_shape(self, features: Features) -> tuple[int, ...]:
        """Shape of the pixels that `decode` gives for measured features."""
        raise self._not_measured()

    def normalised(self, pixels: torch.Tensor, vision: dict) -> torch.Tensor:
        """Pixels that `decode` gave as the vision tower takes them, float32, on the device they are on.

        Args:
            pixels: of one sample, or of several joined along the first dimension.
            vision: the other vision inputs of the same samples, joined alike.
        """
        raise self._not_measured()

    def normalised_shape(self, shape: tuple[int, ...], vision: dict) -> tuple[int, ...]:
        """Shape of what `normalised` makes of pixels of the given shape."""
        return tuple(shape)

    def not_as_measured(self, source: Any) -> ValueError:
        """The error of `decode` for an image that fills other tokens than its header promised; the batch is laid out by then."""
        return ValueError(f"image {image_name(source)}: decoded it has another size than its header says; save it anew")

    def _not_measured(self) -> ValueError:
        return ValueError(f"{type(self).__name__} does not measure images by their headers; call it instead of measure")

    def _features(self, item: Item, open_one) -> tuple[Features, list[list]]:
        """The features of an input and the frames of each of its visuals, as `open_one` gave them."""
        text, kinds = self.native_text(item)
        images, videos = iter(item.images), iter(item.videos)
        kinds = [] if item.markers_are_text else kinds
        opened = [[open_one(next(images))] if kind == "image" else self.frames(next(videos), open_one) for kind in kinds]
        visuals = [self.process_image(f[0]) if kind == "image" else self.process_video(f) for kind, f in zip(kinds, opened)]
        return self.assemble(self.tokenize(text), visuals), opened

    def reading(self, **media: Any) -> Processing:
        """The same processing with pictures and films read otherwise (options of `READING`); `self` stays as it is."""
        twin = copy.copy(self)
        other = sorted(set(media) - set(READING))
        if other:
            raise ValueError(f"reading otherwise: expected {', '.join(READING)}, got {', '.join(other)}; load the model with it")
        for name, value in media.items():
            check_option(name, value, self.shared_defaults[name])
        twin.options = {**self.options, **media}
        twin._check_names()
        return twin

    def open(self, image: Any) -> Any:
        """An RGB PIL image of what `vlm2vec.media.sources` takes."""
        return open_picture(image, background=self.options["background"], **self._reading())

    def _reading(self) -> dict[str, Any]:
        limit = self.options["max_image_pixels"]
        return {"orientation": self.options["orientation"], **({} if limit is None else {"max_pixels": limit})}

    def _measured(self, image):
        """An image file by its header; a picture that is in memory already as it is."""
        if not isinstance(image, (str, os.PathLike, bytes, bytearray)):
            return self.open(image)
        return measure_picture(image, **self._reading())

    def frames(self, video: Any, open_one: Callable | None = None) -> Frames:
        """The frames of a film that the options choose, opened, with their times."""
        film = read_frames(video, **{name: self.options[name] for name in ("frames", "fps", "max_frames")})
        return Frames([(open_one or self.open)(f) for f in film], film.seconds)

    def assemble(self, ids: list[int], visuals: list[Visual]) -> Features:
        """Expand each marker token to its visual's tokens and cut a text that is too long around them."""
        markers = {i for i in (self.image_token_id, self.video_token_id) if i is not None} if visuals else set()
        pieces, queue = [], list(visuals)
        for token in ids:
            if queue and token in markers:
                visual = queue.pop(0)
                pieces.append(visual)
            else:
                pieces.append(token)
        if queue:
            raise ValueError(f"the tokenizer lost {len(queue)} image markers; is {self.image_marker!r} a token of its vocabulary?")
        given, pieces = pieces, self._truncate(pieces)
        out, spans, index = [], [], []
        for piece in pieces:
            if not isinstance(piece, Visual):
                out.append(piece)
                continue
            token_id = self.image_token_id if piece.token_id is None else piece.token_id
            for part in piece.pieces or [(piece.tokens, piece.grid)]:
                if isinstance(part, int):
                    out.append(part)
                    continue
                spans.append((len(out), part[1], part[0]))
                index.extend(range(len(out), len(out) + part[0]))
                out.extend([token_id] * part[0])
        if not out:
            raise ValueError("input has no tokens: an empty text without an image has no embedding; feed at least one word")
        input_ids = torch.tensor(out, dtype=torch.long)
        return Features(
            input_ids,
            concat_vision([v.tensors for v in visuals]),
            torch.tensor(index, dtype=torch.long) if index else None,
            self.positions(input_ids, spans),
            sum(v.patches for v in visuals),
            cut=pieces is not given,
        )

    def _truncate(self, pieces: list, kept_ids: frozenset | None = None) -> list:
        """Keep the first text tokens that fit besides the image tokens (and a chat template's own), which are never cut."""
        limit = self._limit(pieces)
        if limit is None or sum(p.length if isinstance(p, Visual) else 1 for p in pieces) <= limit:
            return pieces
        named = self._named(limit)
        kept_ids = self.kept_ids if kept_ids is None else kept_ids
        free = [isinstance(p, int) and p not in kept_ids and at < len(pieces) - self.tail for at, p in enumerate(pieces)]
        fixed = sum(p.length if isinstance(p, Visual) else 1 for p, cuttable in zip(pieces, free) if not cuttable)
        text, room = sum(free), limit - fixed
        if room < 0:
            raise ValueError(
                f"{named}: below the {fixed} image tokens of the input, which are never cut; "
                f"{'raise max_length or ' if limit == self.max_length else ''}lower {self.image_limit}"
            )
        self._count_cut(named, text, fixed, room)
        shortened = []
        for piece, cuttable in zip(pieces, free):
            if not cuttable or room > 0:
                shortened.append(piece)
                room -= cuttable
        return shortened

    def _limit(self, pieces: list) -> int | None:
        """Most tokens of an input, None for any number."""
        media = any(isinstance(piece, Visual) for piece in pieces)
        limits = [self.max_length, self.positions_limit, None if media else self.options["text_max_length"]]
        return min((limit for limit in limits if limit is not None), default=None)

    def _named(self, limit: int) -> str:
        """A limit in words, by the option that it is of."""
        said = {"max_length": self.max_length, "text_max_length": self.options["text_max_length"]}
        return next((f"{name}={limit}" for name, value in said.items() if value == limit), f"the model's {limit} positions")

    def _count_cut(self, named: str, text: int, fixed: int, room: int) -> None:
        """Before a text is cut: refuse it where that was asked for, else warn now and then.

        Args:
            named: the limit in words. text, fixed: tokens that can be cut and those that stay. room: of the first, how many stay.
        """
        if not self.options["truncation"]:
            raise ValueError(
                f"{text + fixed} tokens are more than {named}; shorten the text, or say truncation=True to feed its first {room} tokens"
            )
        self.truncated += 1
        if self.truncated in (1, 10, 100) or self.truncated % 1000 == 0:
            warnings.warn(
                f"{self.truncated} text{'s' if self.truncated > 1 else ''} so far cut to {named}{' tokens' if '=' in named else ''} "
                f"(the last one had {text} besides {fixed} that stay)",
                stacklevel=4,
            )
