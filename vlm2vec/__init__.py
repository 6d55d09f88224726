"""VLM2Vec: one embedding model for any mix of text, images and video."""

__version__ = "0.1.0"


def __getattr__(name):
    # Lazy, so that `import vlm2vec` costs nothing and works without transformers.
    if name == "VLM2Vec":
        from vlm2vec.model import VLM2Vec

        return VLM2Vec
    raise AttributeError(f"module 'vlm2vec' has no attribute {name!r}")
