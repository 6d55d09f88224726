"""An index of a folder's pictures, films and texts: `Index.build`, `open`, `update`, `search`."""

from vlm2vec.data.index.changes import Changes
from vlm2vec.data.index.state import is_index
from vlm2vec.data.index.store import Hit, Index

__all__ = ["Changes", "Hit", "Index", "is_index"]
