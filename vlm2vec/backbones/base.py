"""What a family of backbones must say, and everything that families share.

A family is one file with two classes and one line in `vlm2vec/backbones/__init__.py`:

* a `Processing`: input -> `Features`, on the CPU, without weights, picklable for DataLoader workers;
* a `Backbone`: how the transformers module is loaded and how a packed batch runs through it. It holds no tensors, the module is
  handed to it, so that state dicts and FSDP see only the module.
"""

import re
import warnings
from dataclasses import dataclass, field

import torch

from vlm2vec import attention
from vlm2vec.images import open_image
from vlm2vec.inputs import MARKER, Item, as_item
from vlm2vec.packing import Features, PackedBatch, concat_vision, pack


@dataclass
class Visual:
    """One image or video after preprocessing.

    Attributes:
        tokens: how many tokens it takes in the language model.
        tensors: inputs of the vision tower; first dimensions are joined over the visuals of a chunk.
        patches: cost in the vision tower.
        token_id: id that its tokens bear in `input_ids`.
        grid: (t, h, w) in merged patches, where the family positions tokens by it.
        pieces: how its tokens stand in the text when they are not one run: token ids (int) and runs of visual tokens
            ((count, grid)), in order. None is one run of `tokens`.
    """

    tokens: int
    tensors: dict = field(default_factory=dict)
    patches: int = 0
    token_id: int | None = None
    grid: tuple[int, int, int] | None = None
    pieces: list | None = None

    @property
    def length(self) -> int:
        """Tokens that it takes in the text, those between its runs included."""
        return self.tokens + sum(1 for p in self.pieces or () if isinstance(p, int))


class Processing:
    """Tokenizer, image processor and the family's rules. Families override the hooks; `__call__` is the same for all.

    Class attributes of a family:
        image_marker, video_marker: the text that stands for a visual in this family's vocabulary (None: not supported).
        defaults: the family's options and their default values; other option names are an error.
    """

    image_marker: str | None = None
    video_marker: str | None = None
    defaults: dict = {}
    shared_defaults = {"max_length": None, "layout": "image", "frames": 8, "max_image_pixels": None, "append_eos": False}

    def __init__(self, tokenizer, image_processor, config, options: dict | None = None):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        options = dict(options or {})
        known = {**self.shared_defaults, **self.defaults}
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"unknown options {unknown} for {type(self).__name__}; it has {', '.join(sorted(known))}")
        self.options = {**known, **options}
        self.max_length = self.options["max_length"]
        self.truncated = 0
        self.kept_ids: frozenset = frozenset()  # text tokens that shortening leaves in place
        self.tail = int(self.options["append_eos"])  # last tokens that shortening leaves in place
        self.image_token_id = None if self.image_marker is None else tokenizer.convert_tokens_to_ids(self.image_marker)
        self.video_token_id = None if self.video_marker is None else tokenizer.convert_tokens_to_ids(self.video_marker)

    # -- hooks ----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_folder(cls, folder: str, config, options: dict | None = None, **hub):
        """Read tokenizer and image processor from a model folder or hub name."""
        from transformers import AutoImageProcessor, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, **hub)
        backend = "torchvision" if (options or {}).get("pixels") == "torchvision" else "pil"
        return cls(tokenizer, AutoImageProcessor.from_pretrained(folder, backend=backend, **hub), config, options)

    def save(self, folder: str) -> None:
        """Write tokenizer and processor files so that transformers' AutoProcessor reads the folder."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    @property
    def prompts(self) -> dict[str, str]:
        """Named prompts that the family brings; "query" and "document" are used by encode_query and encode_document."""
        return {}

    @property
    def prompt_is_instruction(self) -> bool:
        """Whether a prompt goes where the chat template holds an instruction, and not before the text."""
        return bool(self.options.get("chat_template"))

    def hf_processor(self):
        """transformers' own processor object, None when there is none."""
        return None

    def process_image(self, image) -> Visual:
        """One RGB PIL image -> its inputs for the vision tower."""
        raise ValueError(f"{type(self).__name__} takes no images")

    def process_video(self, frames: list) -> Visual:
        """RGB PIL frames of one video -> its inputs for the vision tower."""
        raise ValueError(f"{type(self).__name__} takes no videos; give its frames as images")

    def positions(self, input_ids: torch.Tensor, spans: list[tuple[int, tuple | None, int]]) -> torch.Tensor | None:
        """Position ids (L,) or (3, L); None for 0..L-1. `spans` holds (first token, grid, tokens) of each visual run."""
        return None

    def tokenize(self, text: str) -> list[int]:
        """Ids of the text with each visual still one marker token."""
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        return ids + [self.tokenizer.eos_token_id] if self.options["append_eos"] else ids

    def render(self, item: Item) -> str:
        """The item's text with its instruction, still with MMEB's markers. Default: the layouts of `vlm2vec.prompts`."""
        from vlm2vec.prompts import layout

        return item.text if item.instruction is None else layout(item.instruction, item.text, self.options["layout"])

    # -- shared ---------------------------------------------------------------------------------------------------------

    def native_text(self, item: Item) -> tuple[str, list[str]]:
        """Swap MMEB's markers for the family's own; returns the text and the kinds of the visuals in their order."""
        text = self.render(item)
        swapped = MARKER.sub(lambda m: self._marker(m.group(1)), text)
        native = [("image", self.image_marker), ("video", self.video_marker)]
        native = [(k, m) for k, m in native if m is not None and not (k == "video" and m == self.image_marker)]
        kinds = []
        if native:
            pattern = re.compile("|".join(re.escape(m) for _, m in native))
            by_marker = {m: k for k, m in native}
            kinds = [by_marker[m] for m in pattern.findall(swapped)]
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

    def __call__(self, x) -> Features:
        """One input -> `Features`. Thread- and process-safe but for the counter of shortened texts.

        Raises:
            ValueError: names what is wrong with the input and the mend.
        """
        item = as_item(x)
        text, kinds = self.native_text(item)
        images, videos = iter(item.images), iter(item.videos)
        visuals = [] if item.markers_are_text else [
            self.process_image(self.open(next(images))) if kind == "image" else self.process_video(self.frames(next(videos)))
            for kind in kinds
        ]  # fmt: skip
        return self.assemble(self.tokenize(text), visuals)

    def open(self, image):
        limit = self.options["max_image_pixels"]
        return open_image(image) if limit is None else open_image(image, max_pixels=limit)

    def frames(self, video) -> list:
        from vlm2vec.videos import read_frames

        return [self.open(f) for f in read_frames(video, self.options["frames"])]

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
        pieces = self._truncate(pieces)
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
        )

    def _truncate(self, pieces: list) -> list:
        """Keep the first text tokens that fit besides the image tokens (and a chat template's own), which are never cut."""
        if self.max_length is None:
            return pieces
        free = [isinstance(p, int) and p not in self.kept_ids and at < len(pieces) - self.tail for at, p in enumerate(pieces)]
        fixed = sum(p.length if isinstance(p, Visual) else 1 for p, cuttable in zip(pieces, free) if not cuttable)
        text, room = sum(free), self.max_length - fixed
        if text <= room:
            return pieces
        if room < 0:
            raise ValueError(
                f"max_length={self.max_length} is below the {fixed} image tokens of the input; image tokens are never cut: "
                "raise max_length or lower max_pixels"
            )
        self.truncated += 1
        if self.truncated in (1, 10, 100) or self.truncated % 1000 == 0:
            warnings.warn(
                f"{self.truncated} text{'s' if self.truncated > 1 else ''} so far cut to max_length={self.max_length} tokens "
                f"(the last one had {text} besides {fixed} that stay)",
                stacklevel=3,
            )
        kept = []
        for piece, cuttable in zip(pieces, free):
            if not cuttable or room > 0:
                kept.append(piece)
                room -= cuttable
        return kept


class Backbone:
    """A family's rules for its transformers module. Override what differs.

    Class attributes:
        name: registry key, written to vlm2vec.json.      processing_class: its `Processing`.
        packs: False for families whose layers carry state from token to token (recurrent, linear attention) or that see images
            bidirectionally: their samples leak into each other when packed, so they are padded inside `last_hidden`.
        adapter_renames: (pattern, replacement) pairs that bring older weight names to the module's own, tried in order.
        hub_names: (pattern, replacement) pairs from the module's names to those of the hub's checkpoints, first match only.
        unquantized: parts whose names contain one of these stay in full precision when the base is quantised.
        unused_keys: patterns of checkpoint names that the embedding model does not have, with the reason in a comment.
    """

    name: str = ""
    processing_class: type[Processing] = Processing
    packs = True
    adapter_renames: list[tuple[str, str]] = []
    hub_names: list[tuple[str, str]] = [(r"^", "model.")]
    unquantized: tuple[str, ...] = ("visual", "vision_tower", "vision_model", "vision_embed_tokens", "multi_modal_projector", "connector", "lm_head")
    unused_keys: list[str] = [r"^lm_head\."]  # the embedding model has no language-model head
    architecture: str | None = None  # the class that config.json should name

    # -- loading --------------------------------------------------------------------------------------------------------

    def config(self, source: str, raw: dict):
        """The configuration object for a folder or hub name; `raw` is its config.json."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(source)
        except (ValueError, KeyError) as e:
            raise ValueError(f"{source}: model_type {raw.get('model_type')!r} is unknown to this transformers ({e})") from e

    def options_for(self, source: str, raw: dict) -> dict:
        """Options that a checkpoint wants without saying so in vlm2vec.json (a public one, known by its name or config)."""
        return {}

    def model_class(self, config):
        """Class of the bare module (no lm_head)."""
        from transformers import AutoModel

        return AutoModel

    def finish(self, model) -> None:
        """After loading: switch the module to packed attention."""
        attention.register()
        for module in self.text_model(model).modules():
            if hasattr(module, "config") and hasattr(module.config, "_attn_implementation_internal"):
                module.config._attn_implementation_internal = attention.TEXT_ATTENTION
        tower = self.vision_tower(model)
        for module in [] if tower is None else tower.modules():
            if hasattr(module, "config") and hasattr(module.config, "_attn_implementation_internal"):
                module.config._attn_implementation_internal = attention.VISION_ATTENTION

    def text_model(self, model):
        """The decoder: takes inputs_embeds and position_ids, ends with `.norm`."""
        return model.language_model

    def vision_tower(self, model):
        """The vision tower, None when the family has none."""
        return getattr(model, "visual", None)

    def embedding_dim(self, config) -> int:
        return config.get_text_config().hidden_size

    # -- running --------------------------------------------------------------------------------------------------------

    def pack(self, features: list[Features], provider: str = "sdpa") -> PackedBatch:
        """Lay samples one behind the other and prepare what the layers need, on the CPU."""
        packed = pack(features)
        packed.segments.provider = provider
        if packed.vision:
            packed.vision = self.prepare_vision(packed.vision, provider)
        return packed

    def prepare_vision(self, vision: dict, provider: str) -> dict:
        """From the joined `Visual.tensors` to what `vision` wants: grids as Python lists, segments, positions."""
        return vision

    def vision(self, model, packed: PackedBatch) -> torch.Tensor | None:
        """Vision features (V, D) in the order of `packed.visual_index`; None without visuals."""
        return None

    def embed(self, model, packed: PackedBatch, features: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings with the vision features in their places, (T, D)."""
        embeds = self.text_model(model).get_input_embeddings()(packed.input_ids)
        if features is None:
            return embeds
        return embeds.index_copy(0, packed.visual_index, features.to(embeds.dtype))

    def text_kwargs(self, model, packed: PackedBatch, features: torch.Tensor | None) -> dict:
        """More keyword arguments for the decoder (Qwen3-VL's deepstack features)."""
        return {}

    def last_hidden(self, model, packed: PackedBatch, features: torch.Tensor | None) -> torch.Tensor:
        """Hidden state of each sample's last token after the final norm, (B, D)."""
        text = self.text_model(model)
        embeds = self.embed(model, packed, features)
        with last_tokens_only(text.norm, packed.last_index):
            out = text(
                inputs_embeds=embeds[None],
                position_ids=self.position_argument(packed),
                attention_mask=self.no_mask(text),
                use_cache=False,
                segments=packed.segments,
                **self.text_kwargs(model, packed, features),
            )
        return out.last_hidden_state[0]

    def position_argument(self, packed: PackedBatch) -> torch.Tensor:
        """Position ids as the decoder takes them: (1, T), or (3, 1, T)."""
        return packed.position_ids[..., None, :]

    def no_mask(self, text):
        """Packed attention needs no mask; a dictionary tells transformers that masks are already made."""
        return {kind: None for kind in ("full_attention", "sliding_attention")}


class last_tokens_only:
    """Within it, a decoder's final norm sees only the rows (B,) it is asked for: (1, T, D) -> (1, B, D)."""

    def __init__(self, norm, index: torch.Tensor):
        self.norm, self.index = norm, index

    def __enter__(self):
        self.handle = self.norm.register_forward_pre_hook(lambda module, args: (args[0].index_select(1, self.index),))

    def __exit__(self, *exc):
        self.handle.remove()


def override(module: torch.nn.Module, **methods) -> None:
    """Give one module other methods; its weights, their names and its siblings stay as they are."""
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), methods)


def patches_as_linear(self, patches: torch.Tensor) -> torch.Tensor:
    """`forward` of a patch embedding, a convolution whose stride is its kernel, as the matrix product that it is.

    On a CPU the convolution's backward is several times slower than the product.
    """
    weight = self.proj.weight.flatten(1)
    return torch.nn.functional.linear(patches.view(-1, weight.shape[1]).to(weight.dtype), weight, self.proj.bias)
