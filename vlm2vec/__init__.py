"""VLM2Vec: one embedding model for any mix of text, images and video."""

from typing import Any

from vlm2vec.checkpoint.release import __version__

__all__ = ["Index", "VLM2Vec", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import vlm2vec` costs nothing and works without transformers.
    if name == "VLM2Vec":
        from vlm2vec.model import VLM2Vec

        return VLM2Vec
    if name == "Index":
        from vlm2vec.data.index import Index

        return Index
    raise AttributeError(f"module 'vlm2vec' has no attribute {name!r}")
