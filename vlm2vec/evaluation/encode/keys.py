"""What an embedding depends on: the input's content and the model's identity, as short hashes.

Keys hold file contents, not paths or times: a picture that was replaced is encoded again, one that was moved is not.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from torch import nn

from vlm2vec.checkpoint.release import __version__
from vlm2vec.inputs import VISUAL_KEYS

DIGEST = 16
READ_BYTES = 1 << 20


def _hash():
    return hashlib.blake2b(digest_size=DIGEST)


class ContentHashes:
    """Hash of a file's bytes, read once per path and run."""

    def __init__(self):
        self._known = {}

    def of(self, visual: Any) -> bytes:
        """16-byte digest of a path's content, of bytes, or of a PIL image's pixels. ValueError when a file is missing."""
        if isinstance(visual, (str, os.PathLike)):
            path = os.fspath(visual)
            if path not in self._known:
                self._known[path] = self._file(path)
            return self._known[path]
        digest = _hash()
        if isinstance(visual, (bytes, bytearray)):
            digest.update(b"file")
            digest.update(visual)
        elif hasattr(visual, "tobytes") and hasattr(visual, "mode"):
            digest.update(f"pixels {visual.mode} {visual.size}".encode())
            digest.update(visual.tobytes())
        else:
            raise ValueError(f"expected a path, bytes or a PIL image, got {type(visual).__name__}")
        return digest.digest()

    @staticmethod
    def _file(path):
        digest = _hash()
        digest.update(b"file")
        try:
            with open(path, "rb") as file:
                while block := file.read(READ_BYTES):
                    digest.update(block)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        return digest.digest()


def item_key(item: dict[str, Any], hashes: ContentHashes, prompt: str | None = None) -> bytes:
    """16-byte key of one model input under one prompt.

    Args:
        item: {"text":, "image":, "video":, "instruction":}; a video is a path or a list of frames.
        hashes: a ContentHashes. prompt: what `encode(prompt=)` puts in front, or None.

    Raises: ValueError naming the file that cannot be read.
    """
    if item.get("unreadable"):
        raise ValueError(item["unreadable"])
    digest = _hash()
    text = item.get("text") or ""
    given = [name for name in VISUAL_KEYS if name in item]
    # a side that says "no image" feeds a marker in its text as an ordinary token; without a marker that changes nothing
    marker_is_text = "<|" in text and bool(given) and not any(item[name] for name in given)
    digest.update(json.dumps([prompt, text, item.get("instruction"), marker_is_text]).encode())
    for name in VISUAL_KEYS:
        value = item.get(name)
        if value is None or value == "":
            continue
        visuals = value if isinstance(value, (list, tuple)) else [value]
        digest.update(f"{name} {len(visuals)}".encode())
        for visual in visuals:
            frames = visual if isinstance(visual, (list, tuple)) else [visual]
            digest.update(f"of {len(frames)}".encode())
            for frame in frames:
                digest.update(hashes.of(frame))
    return digest.digest()


def weights_digest(module: nn.Module) -> str:
    """Hex digest of a module's parameters and buffers, bytes and names; about one second per GB."""
    import torch

    digest = _hash()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1).contiguous()
        if flat.numel():
            digest.update(flat.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def model_identity(model: Any, **extra: Any) -> dict[str, Any]:
    """Everything a stored vector depends on besides the input, as a JSON-able dict.

    A model may say it itself: `model.identity()` -> dict. Otherwise: family, digest of the weights, dtype, the family
    options in force (image limits, crops, positions), the image processor's settings and the named prompts.
    """
    if callable(getattr(model, "identity", None)):
        known = dict(model.identity())
    else:
        processor = getattr(getattr(model, "processing", None), "image_processor", None)
        known = {
            "class": type(model).__name__,
            "family": getattr(model, "family", None),
            "weights": weights_digest(model) if hasattr(model, "state_dict") else None,
            "dtype": str(getattr(model, "dtype", None)),
            "options": getattr(model, "options", None),
            "image_processor": processor.to_dict() if hasattr(processor, "to_dict") else None,
            "prompts": getattr(model, "prompts", None),
        }
    return json.loads(json.dumps({**known, "vlm2vec": __version__, **extra}, sort_keys=True, default=str))


def identity_digest(identity: dict[str, Any]) -> str:
    """Hex digest that names a model's folder in the store."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
