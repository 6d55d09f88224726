"""The model as a sentence-transformers module, and the files that make a saved folder one.

`to_sentence_transformer(model)` gives a SentenceTransformer with the same embeddings for text, images, video and any mix in one
input. A saved folder carries modules.json. A model with M-RoPE positions and a chat template (Qwen3-VL-Embedding) is described
by stock modules and loads with `SentenceTransformer(folder)`. All others need this module, because stock ones give them other
positions and no text beside an image: `SentenceTransformer(folder, trust_remote_code=True)`, where the code that is trusted is
the installed vlm2vec package and nothing from the folder (sentence-transformers asks for the flag with any foreign class name).
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.modules.input_module import InputModule
from torch import nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from vlm2vec.backbones.options import check_option
from vlm2vec.checkpoint import saving
from vlm2vec.checkpoint.loading import read_json
from vlm2vec.checkpoint.sentence_transformers_files import ABOUT
from vlm2vec.encoding import chunks, preprocess, with_prompt
from vlm2vec.inputs import MODALITIES, NOTHING, as_item, names_a_file
from vlm2vec.media.endings import FILMS, PICTURES
from vlm2vec.media.sources import fetch, image_name, is_url

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from vlm2vec.backbones.processing import Processing


# What one input may hold: sentence-transformers asks for each order of two by itself.
COMBINATIONS = [*MODALITIES, *(pair for kind in ("image", "video") for pair in ((kind, "text"), ("text", kind))), "message"]


class UnitEmbeddings(dict):
    """A module's output. Whatever is set as its sentence embedding has length 1, as what `truncate_dim` leaves of one."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, normalize(value, dim=-1) if key == "sentence_embedding" else value)


class VLM2VecModule(InputModule):
    """Input module that packs a batch, runs it and gives normalised sentence embeddings.

    Its features have names that sentence-transformers knows, so that its trainer finds them and its cached losses cut them into
    mini-batches: `input_ids` and `attention_mask` (N, L), padded on the right, and `rows` (N,), which say where in `samples`, the list
    of all N inputs' `Features`, a mini-batch's inputs are. The model sees the samples alone.
    """

    save_in_root = True
    urls = False  # whether pictures are read from http(s) URLs

    def __init__(self, model: nn.Module):
        super().__init__()
        self.vlm2vec = model

    @property
    def tokenizer(self) -> Any:
        return self.vlm2vec.processing.tokenizer

    @property
    def modalities(self) -> list[str | tuple[str, ...]]:
        return COMBINATIONS

    @property
    def max_seq_length(self) -> int | None:
        """Tokens that an input may have: the option max_length, else what the model has positions for."""
        limit = self.vlm2vec.processing.max_length
        return limit or getattr(self.vlm2vec.config.get_text_config(), "max_position_embeddings", None)

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        self.vlm2vec.processing = cut_to(self.vlm2vec.processing, value)

    def get_embedding_dimension(self) -> int:
        return self.vlm2vec.embedding_dim

    get_sentence_embedding_dimension = get_embedding_dimension

    def preprocess(self, inputs: list, prompt: str | None = None, max_length: int | None = None, **kwargs: Any) -> dict:
        """Features of N inputs. A text without tokens is fed as two spaces, as the reference feeds a missing one.

        Args:
            max_length: cuts this batch shorter than `max_seq_length` does.
        """
        processing = self.vlm2vec.processing
        if max_length is not None:
            processing = cut_to(processing, min(max_length, processing.max_length or max_length))
        inputs = with_prompt(self.vlm2vec, [self._as_sentence_transformers_reads(x) for x in inputs], prompt)
        samples = preprocess(lambda x: processing(with_tokens(processing, x)), inputs)
        ids = [sample.input_ids for sample in samples]
        pad = processing.tokenizer.pad_token_id or 0
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "rows": torch.arange(len(samples)),
            "samples": samples,
        }

    def _as_sentence_transformers_reads(self, x: Any) -> Any:
        """A string that names an existing picture or film, or a picture's URL, is the picture: sentence-transformers' own convention."""
        if names_a_file(x, PICTURES):
            return Path(x)
        if names_a_file(x, FILMS):
            return {"video": x}
        if is_url(x) and " " not in x and x.lower().endswith(PICTURES):
            if not self.urls:
                raise ValueError(
                    f"{image_name(x)} is a picture's URL; set model[0].urls = True to read it, or give {{'text': ...}} to embed the words"
                )
            return fetch(x)
        return x

    def forward(self, features: dict, **kwargs: Any) -> dict:
        model = self.vlm2vec
        samples = [features["samples"][row] for row in features["rows"].tolist()]
        if self.training:  # whole: a cached loss's second pass must draw the first one's dropout
            hidden = model(model.pack(samples).to(model.device))
        else:
            parts = chunks([sample.length for sample in samples], len(samples), model.device.type)
            encoded = torch.cat([model(model.pack([samples[i] for i in part]).to(model.device)) for part in parts])
            order = torch.tensor([i for part in parts for i in part], device=encoded.device)
            hidden = torch.empty_like(encoded).index_copy_(0, order, encoded)
        return UnitEmbeddings({**features, "sentence_embedding": normalize(hidden.float(), dim=-1)})

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Weights, processor files and vlm2vec.json. sentence-transformers writes its own files: its prompts, which it has written by
        now, become the model's too."""
        about = read_json(output_path, ABOUT) or {}
        self.vlm2vec.prompts.update({name: text for name, text in (about.get("prompts") or {}).items() if text})
        saving.save(self.vlm2vec, output_path, merge=False, st_description=False)

    @classmethod
    def load(
        cls, model_name_or_path: str, subfolder: str = "", revision: str | None = None, model_kwargs: dict | None = None, **kwargs: Any
    ) -> VLM2VecModule:
        from vlm2vec.model import VLM2Vec

        wanted = dict(model_kwargs or {})
        dtype = wanted.pop("dtype", wanted.pop("torch_dtype", "auto"))
        source = os.path.join(model_name_or_path, subfolder) if subfolder else model_name_or_path
        return cls(VLM2Vec.from_pretrained(source, dtype=dtype, revision=revision, device="cpu"))


def cut_to(processing: Processing, length: int | None) -> Processing:
    """The same processing with another `max_length`."""
    check_option("max_length", length, None)
    other = copy.copy(processing)
    other.max_length, other.options = length, {**processing.options, "max_length": length}
    return other


def with_tokens(processing: Processing, x: Any) -> Any:
    """The input, or what stands for an empty text where the tokenizer makes nothing of it (no token that begins every text)."""
    item = as_item(x, processing.markers)
    empty = not item.text and not item.visuals and not item.instruction
    return NOTHING if empty and not processing.tokenize(processing.render(item)) else x


def to_sentence_transformer(model: nn.Module) -> SentenceTransformer:
    """A SentenceTransformer around the model: the same weights, the same embeddings."""
    from sentence_transformers import SentenceTransformer

    prompts = {k: v for k, v in model.prompts.items() if v}
    return SentenceTransformer(modules=[VLM2VecModule(model)], device=str(model.device), prompts=prompts)
