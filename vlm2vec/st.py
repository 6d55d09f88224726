"""The model as a sentence-transformers module, and the files that make a saved folder one.

`to_sentence_transformer(model)` gives a SentenceTransformer with the same embeddings for text, images, video and any mix in one
input. A saved folder carries modules.json. A model with M-RoPE positions and a chat template (Qwen3-VL-Embedding) is described
by stock modules and loads with `SentenceTransformer(folder)`. All others need this module, because stock ones give them other
positions and no text beside an image: `SentenceTransformer(folder, trust_remote_code=True)`, where the code that is trusted is
the installed vlm2vec package and nothing from the folder (sentence-transformers asks for the flag with any foreign class name).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentence_transformers.base.modules.input_module import InputModule
from torch import nn

from vlm2vec.inputs import MODALITIES, names_a_file
from vlm2vec.media.endings import FILMS, PICTURES
from vlm2vec.media.sources import fetch, image_name, is_url

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


# What one input may hold: sentence-transformers asks for each order of two by itself.
COMBINATIONS = [*MODALITIES, *(pair for kind in ("image", "video") for pair in ((kind, "text"), ("text", kind))), "message"]


class VLM2VecModule(InputModule):
    """Input module that packs a batch, runs it and gives normalised sentence embeddings."""

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
        return self.vlm2vec.processing.max_length

    def get_embedding_dimension(self) -> int:
        return self.vlm2vec.embedding_dim

    get_sentence_embedding_dimension = get_embedding_dimension

    def preprocess(self, inputs: list, prompt: str | None = None, **kwargs: Any) -> dict:
        from vlm2vec.encoding import with_prompt

        inputs = with_prompt(self.vlm2vec, [self._as_sentence_transformers_reads(x) for x in inputs], prompt)
        return {"packed": self.vlm2vec.pack(self.vlm2vec.preprocess(inputs))}

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
        from torch.nn.functional import normalize

        packed = features["packed"].to(self.vlm2vec.device)
        return {**features, "sentence_embedding": normalize(self.vlm2vec(packed).float(), dim=-1)}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.vlm2vec.save_pretrained(output_path)

    @classmethod
    def load(
        cls, model_name_or_path: str, subfolder: str = "", revision: str | None = None, model_kwargs: dict | None = None, **kwargs: Any
    ) -> VLM2VecModule:
        from vlm2vec.model import VLM2Vec

        wanted = dict(model_kwargs or {})
        dtype = wanted.pop("dtype", wanted.pop("torch_dtype", "auto"))
        source = os.path.join(model_name_or_path, subfolder) if subfolder else model_name_or_path
        return cls(VLM2Vec.from_pretrained(source, dtype=dtype, revision=revision, device="cpu"))


def to_sentence_transformer(model: nn.Module) -> SentenceTransformer:
    """A SentenceTransformer around the model: the same weights, the same embeddings."""
    from sentence_transformers import SentenceTransformer

    prompts = {k: v for k, v in model.prompts.items() if v}
    return SentenceTransformer(modules=[VLM2VecModule(model)], device=str(model.device), prompts=prompts)
