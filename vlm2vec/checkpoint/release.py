"""The release, which saved folders and stored embeddings name; pyproject.toml says the same."""

__version__ = "0.1.0"
