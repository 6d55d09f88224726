"""A model without weights: a vector is drawn by the input's text or its file's bytes. For tests of what lies around a model."""

import hashlib
from pathlib import Path

import torch

WIDTH = 12


def vector(content: bytes | str) -> torch.Tensor:
    """(WIDTH,) of length 1, drawn by a content."""
    content = content.encode() if isinstance(content, str) else content
    seed = int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "big")
    return torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), dim=0)


def embed(inputs: list[dict]) -> tuple[torch.Tensor, dict[int, str]]:
    """(vectors, what cannot be read): inputs as `Index.update(encode=)` gives them; files that begin with BAD cannot."""
    found, bad = [], {}
    for place, x in enumerate(inputs):
        content = x["text"].encode() if x.get("text") else Path(x.get("image") or x.get("video")).read_bytes()
        if content.startswith(b"BAD"):
            bad[place] = "not an image"
        found.append(vector(content))
    return torch.stack(found), bad


class StubModel:
    """What an index asks of a model."""

    embedding_dim = WIDTH
    prompts: dict = {}

    def __init__(self, weights: str = "one", source: str = "stub", **options):
        self.weights, self.source, self.options = weights, source, options

    def identity(self) -> dict:
        return {"family": "stub", "weights": self.weights, "dtype": "torch.float32", "options": self.options}
