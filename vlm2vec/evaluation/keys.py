"""What an embedding depends on: the input's content and the model's identity, as short hashes.

Keys hold file contents, not paths or times: a picture that was replaced is encoded again, one that was moved is not.
"""

import hashlib
import json
import os
from pathlib import Path

DIGEST = 16
READ_BYTES = 1 << 20


def _hash():
    return hashlib.blake2b(digest_size=DIGEST)


class ContentHashes:
    """Hash of a file's bytes, read once per path and run."""

    def __init__(self):
        self._known = {}

    def of(self, visual):
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


def item_key(item, hashes, prompt=None):
    """16-byte key of one model input under one prompt.

    Args:
        item: {"text":, "image":, "video":, "instruction":}; a video is a path or a list of frames.
        hashes: a ContentHashes. prompt: what `encode(prompt=)` puts in front, or None.

    Raises: ValueError naming the file that cannot be read.
    """
    digest = _hash()
    digest.update(json.dumps([prompt, item.get("text"), item.get("instruction"), sorted(item)]).encode())
    for name in ("image", "images", "video", "videos"):
        value = item.get(name)
        if value is None:
            continue
        visuals = value if isinstance(value, (list, tuple)) else [value]
        digest.update(f"{name} {len(visuals)}".encode())
        for visual in visuals:
            frames = visual if isinstance(visual, (list, tuple)) else [visual]
            digest.update(f"of {len(frames)}".encode())
            for frame in frames:
                digest.update(hashes.of(frame))
    return digest.digest()


def weights_digest(module):
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


def _plain(value, depth=0):
    """A JSON-able view of a processing object's settings: numbers, strings, and what they are nested in."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and depth < 4:
        return [_plain(v, depth + 1) for v in value]
    if isinstance(value, dict) and depth < 4:
        return {str(k): _plain(v, depth + 1) for k, v in sorted(value.items(), key=lambda kv: str(kv[0]))}
    return type(value).__name__


def model_identity(model, **extra):
    """Everything a stored vector depends on besides the input, as a JSON-able dict.

    A model may say it itself: `model.identity()` -> dict. Otherwise: class, weights' digest, dtype, and the settings of
    its `processing` object (image limits, crops, positions) and of its `settings`.
    """
    from vlm2vec import __version__

    if callable(getattr(model, "identity", None)):
        known = dict(model.identity())
    else:
        known = {"class": type(model).__name__, "family": getattr(model, "family", None)}
        known["family"] = _plain(known["family"])
        if hasattr(model, "state_dict"):
            known["weights"] = weights_digest(model)
            parameter = next(iter(model.parameters()), None)
            known["dtype"] = str(parameter.dtype) if parameter is not None else None
        for name in ("processing", "settings", "options"):
            value = getattr(model, name, None)
            if isinstance(value, dict):
                known[name] = _plain(value)
            elif value is not None and hasattr(value, "__dict__"):
                known[name] = _plain(vars(value))
    return {**known, "vlm2vec": __version__, **extra}


def identity_digest(identity):
    """Hex digest that names a model's folder in the store."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def write_json(path, content, **options):
    """Write JSON to a temporary name, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, ensure_ascii=False, indent=2, **options) + "\n", encoding="utf-8")
    os.replace(part, path)
