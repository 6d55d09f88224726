"""Any other `AutoModelForImageTextToText`: the library's own processor and forward pass, batched with padding.

Nothing is assumed about the family's layers, so samples are not packed: layers may be recurrent (hybrids with no file of their own) or
see images in both directions (Gemma 3), where packed samples would leak into each other. Inside `last_hidden` samples are padded
on the right, so that nothing stands before a real token, and only samples with vision inputs of the same shapes share a forward
pass. Positions, image limits and pixels are the family's own. The vision tower runs inside the forward pass.

A model with an audio encoder hears: sounds stand before the text, each as the processor's own marker (with its opening and closing
tokens where it names them), 16 kHz mono and cut to `audio_max_seconds`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm2vec.backbones.base import Backbone, Processing, Visual
from vlm2vec.backbones.literals import WithLiterals
from vlm2vec.inputs import Item
from vlm2vec.media.sounds import MAX_SECONDS, read_sound
from vlm2vec.packing import Features, PackedBatch, pack

if TYPE_CHECKING:
    from transformers import PretrainedConfig


TEXT_KEYS = ("input_ids", "attention_mask")
SOUND_KEYS = ("input_features", "feature_attention_mask")  # beginnings of the names of what a feature extractor gives


class GenericProcessing(Processing):
    """Options: the shared ones and

    chat_template: True feeds the model's own chat template with the instruction, where given, as the system message.
    audio_max_seconds: what a sound holds beyond it is cut off.
    """

    defaults = {"chat_template": False, "audio_max_seconds": MAX_SECONDS}

    def __init__(self, tokenizer: Any, image_processor: Any, config: PretrainedConfig, options: dict | None = None):
        super().__init__(tokenizer, image_processor, config, options)
        self.hf = None

    @classmethod
    def from_folder(cls, folder: str, config: PretrainedConfig, options: dict | None = None, **hub: Any) -> GenericProcessing:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(folder, **hub)
        processing = cls(processor.tokenizer, getattr(processor, "image_processor", None), config, options)
        processing.hf = processor
        # Gemma 3's processor wants the token that opens an image and writes the image tokens itself.
        processing.image_marker = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
        processing.video_marker = getattr(processor, "video_token", None)
        processing.audio_marker = audio_marker(processor)
        names = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
        ids = [getattr(config, name, None) for name in names]
        processing.kept_ids = frozenset(i for i in (*ids, *processor.tokenizer.all_special_ids) if i is not None)
        return processing

    def hf_processor(self) -> Any:
        return self.hf

    def save(self, folder: str) -> None:
        self.hf.save_pretrained(folder)

    def render(self, item: Item) -> str:
        if not self.options["chat_template"]:
            return super().render(item)
        messages = [{"role": "user", "content": item.text.replace("|>\n", "|>") if item.markers_added else item.text}]
        if item.instruction:
            messages.insert(0, {"role": "system", "content": item.instruction})
        return self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def __call__(self, x: Any) -> Features:
        item = self.item(x)
        text, kinds = self.native_text(item)
        if item.sounds:
            text = self._with_sounds(item, text)
        if (item.markers_are_text or not kinds) and not item.sounds:
            features = self.assemble(self.tokenize(text), [])
            if "token_type_ids" in self.hf.model_input_names:  # Gemma 3 wants them in training, zero for text
                features.vision = {"token_type_ids": features.input_ids.new_zeros(1, features.length)}
            return features
        if isinstance(text, WithLiterals):
            raise self._taken(text[slice(*text.literals[0])])
        inputs = self.hf(
            text=[text],
            images=[[self.open(i) for i in item.images]] if item.images else None,
            **({"videos": [[self.frames(v) for v in item.videos]]} if item.videos else {}),
            **({"audio": [read_sound(s, max_seconds=self.options["audio_max_seconds"]) for s in item.sounds]} if item.sounds else {}),
            return_tensors="pt",
        )
        ids = inputs["input_ids"][0]
        if self.options["append_eos"]:
            ids = torch.cat([ids, ids.new_tensor([self.tokenizer.eos_token_id])])
        kept_positions = self._kept(ids.tolist())
        vision = {}
        for key, value in inputs.items():
            if key in TEXT_KEYS:
                continue
            if per_token(key, value, inputs["input_ids"].shape[1]):
                # one number per token (token types): cut as the text is
                value = torch.cat([value, value.new_zeros(1, len(ids) - value.shape[1])], dim=1)[:, kept_positions]
            vision[key] = value
        patches = sum(v.shape[:-3].numel() for k, v in vision.items() if k.startswith("pixel_values") and v.dim() > 3)
        return Features(ids[kept_positions], vision, None, None, patches, cut=len(kept_positions) < len(ids))

    def _taken(self, literal: str) -> ValueError:
        return ValueError(
            f"the text beside media holds {literal!r}, which {type(self.hf).__name__} takes for the place of one; take it out"
        )

    def _with_sounds(self, item: Item, text: str) -> str:
        """The text behind the markers of its sounds. ValueError for one that holds a marker of its own."""
        if isinstance(text, WithLiterals):
            raise self._taken(text[slice(*text.literals[0])])
        if self.hf.audio_token in text:
            raise self._taken(self.hf.audio_token)
        marks = [self.audio_marker] * len(item.sounds)
        return "\n".join([*marks, text] if text else marks)

    def _kept(self, ids: list[int]) -> list[int]:
        """Positions that stay when the text is cut to max_length."""
        marked = [Visual(1, {}, token_id=at) if token in self.kept_ids else at for at, token in enumerate(ids)]
        pieces = self._truncate(marked, kept_ids=frozenset())  # positions here, not ids
        return [piece.token_id if isinstance(piece, Visual) else piece for piece in pieces]


def audio_marker(processor: Any) -> str | None:
    """What stands for a sound in a text of this processor's; None for one without audio."""
    marker = getattr(processor, "audio_token", None)
    if marker is None or getattr(processor, "feature_extractor", None) is None:
        return None
    around = [getattr(processor, f"audio_{end}_token", None) or "" for end in ("bos", "eos")]
    return marker.join(around)


class Generic(Backbone):
    name = "generic"
    sections = ()  # families differ
    processing_class = GenericProcessing
    packs = False
    unused_keys = [r"(^|\.)lm_head\."]  # the embedding model has no language-model head
    adapter_renames = [(r"^model\.", "")]

    def config(self, source: str, raw: dict, **hub: Any) -> PretrainedConfig:
        from transformers import __version__
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING

        config = super().config(source, raw, **hub)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            from vlm2vec.backbones import FAMILIES

            raise ValueError(
                f"{source}: family {raw.get('model_type')!r} is not a vision-language model that transformers knows; "
                f"there are {', '.join(FAMILIES)} and every AutoModelForImageTextToText"
            )
        if type(config) not in MODEL_MAPPING:  # Qwen2.5-Omni's thinker, before 5.24
            family = raw.get("model_type")
            raise ValueError(
                f"{source}: expected a transformers that has {family!r} without its head, got {__version__}; install a newer one"
            )
        self.architecture = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__
        return config

    def finish(self, model: nn.Module) -> None:
        """The module keeps the attention that transformers chose for it."""

    def text_model(self, model: nn.Module) -> nn.Module:
        return model.get_decoder() or model

    def vision_tower(self, model: nn.Module) -> nn.Module | None:
        towers = (getattr(model, name, None) for name in ("visual", "vision_tower", "vision_model"))
        return next((tower for tower in towers if tower is not None), None)

    def pack(self, features: list[Features], provider: str = "sdpa") -> PackedBatch:
        packed = pack([replace(f, vision={}) for f in features])
        packed.vision = {"samples": [f.vision for f in features]} if any(f.vision for f in features) else {}
        return packed

    def last_hidden(self, model: nn.Module, packed: PackedBatch, features: torch.Tensor | None) -> torch.Tensor:
        rows = packed.input_ids.split(packed.seqlens)
        samples = packed.vision.get("samples") or [{}] * len(rows)
        groups: dict = {}
        for i, sample in enumerate(samples):
            groups.setdefault(signature(sample, packed.seqlens[i]), []).append(i)
        out = [None] * len(rows)
        for members in groups.values():
            hidden = self._padded(model, [rows[i] for i in members], [samples[i] for i in members])
            for i, row in zip(members, hidden):
                out[i] = row
        return torch.stack(out)

    def _padded(self, model, rows: list[torch.Tensor], samples: list[dict]) -> torch.Tensor:
        lengths = torch.tensor([len(r) for r in rows], device=rows[0].device)
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = (torch.arange(input_ids.shape[1], device=lengths.device) < lengths[:, None]).long()
        more = {}
        for key in samples[0]:
            values = [s[key] for s in samples]
            if per_token(key, values[0], len(rows[0])):
                more[key] = torch.nn.utils.rnn.pad_sequence([v[0] for v in values], batch_first=True)
            elif isinstance(values[0], torch.Tensor):
                value = torch.cat(values)
                more[key] = value.to(model.dtype) if value.is_floating_point() else value
        hidden = model(input_ids=input_ids, attention_mask=mask, use_cache=False, return_dict=True, **more).last_hidden_state
        return hidden[torch.arange(len(rows), device=hidden.device), lengths - 1]


def per_token(key: str, value: Any, length: int) -> bool:
    """Whether a model input is one number per token; a mask of a sound's frames is not, however many there are."""
    return (
        not key.startswith(SOUND_KEYS)
        and isinstance(value, torch.Tensor)
        and value.dim() == 2
        and value.shape == (1, length)
        and not value.is_floating_point()
    )


def signature(sample: dict, length: int) -> tuple:
    """Samples of one signature can share a forward pass: the same keys, the same shapes behind the first dimension."""
    parts = []
    for key, value in sorted(sample.items()):
        shape = ("per token",) if per_token(key, value, length) else tuple(value.shape[1:]) if isinstance(value, torch.Tensor) else None
        parts.append((key, shape))
    return tuple(parts)
