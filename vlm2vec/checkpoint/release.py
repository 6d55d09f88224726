"""The release, which saved folders and stored embeddings name: its one home, read by pyproject.toml and kernels/setup.py."""

__version__ = "0.1.0"
