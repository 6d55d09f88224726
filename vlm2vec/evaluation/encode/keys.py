"""What an embedding depends on: the input's content and the model's identity, as short hashes.

Keys hold file contents, not paths or times: a picture that was replaced is encoded again, one that was moved is not.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import nn

from vlm2vec.checkpoint.release import __version__
from vlm2vec.evaluation.tasks.task_data import whole
from vlm2vec.files.documents import require_regular
from vlm2vec.inputs import MEDIA_KEYS, SETTING_KEYS
from vlm2vec.media.sounds import Sound

DIGEST = 16
READ_BYTES = 1 << 20


def _hash():
    return hashlib.blake2b(digest_size=DIGEST)


class ContentHashes:
    """Hash of a file's bytes, read once per path and run."""

    def __init__(self):
        self._known = {}
        self._last: tuple[Any, bytes] | None = None  # bytes that were asked for last: an input's media are asked for more than once

    def of(self, visual: Any) -> bytes:
        """16-byte digest of a path's content, of bytes, or of a PIL image's pixels. ValueError when a file is missing."""
        if isinstance(visual, (str, os.PathLike)):
            path = os.fspath(visual)
            if path not in self._known:
                self._known[path] = self._file(path)
            return self._known[path]
        if isinstance(visual, bytes) and self._last is not None and self._last[0] is visual:
            return self._last[1]
        given, digest = visual, _hash()
        if isinstance(visual, Sound):
            digest.update(f"sound {visual.start} {visual.end}".encode())
            visual = self.of(visual.source)
        if isinstance(visual, (bytes, bytearray)):
            digest.update(b"file")
            digest.update(visual)
        elif hasattr(visual, "tobytes") and hasattr(visual, "mode"):
            digest.update(f"pixels {visual.mode} {visual.size}".encode())
            digest.update(visual.tobytes())
        else:
            raise ValueError(f"expected a path, bytes or a PIL image, got {type(visual).__name__}")
        found = digest.digest()
        if isinstance(given, bytes):
            self._last = given, found
        return found

    @staticmethod
    def _file(path):
        digest = _hash()
        digest.update(b"file")
        require_regular(path)  # a pipe would be waited for, a device read without end
        try:
            with open(path, "rb") as file:
                while block := file.read(READ_BYTES):
                    digest.update(block)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        return digest.digest()


def visual_key(item: dict[str, Any], hashes: ContentHashes) -> bytes:
    """Content of an input's media and what it says of them, b"" without any; inputs that share it share reading and the vision tower."""
    parts = []
    for name in MEDIA_KEYS:
        value = item.get(name)
        value = [] if value is None or value == "" else value
        for visual in value if isinstance(value, (list, tuple)) else [value]:
            frames = visual if isinstance(visual, (list, tuple)) else [visual]
            parts += [f"{name} {len(frames)} ".encode(), *(hashes.of(frame) for frame in frames)]
    said = {name: item[name] for name in SETTING_KEYS if item.get(name) is not None} if parts else {}
    return b"".join([*parts, json.dumps(said, sort_keys=True).encode()] if said else parts)


class Contents:
    """Digests of a task's texts, a side each, and of its media, to say which of them another run's data has otherwise."""

    def __init__(self, hashes: ContentHashes):
        self.hashes = hashes
        self._parts = {name: hashlib.blake2b(digest_size=12) for name in ("query_texts", "candidate_texts", "media")}

    def add(self, side: str, item: dict[str, Any]) -> None:
        """The next input of a side, "query" or "candidate", read whole."""
        self._note(f"{side}_texts", json.dumps([item.get("text"), item.get("instruction")]).encode())
        try:
            self._note("media", b"unreadable" if item.get("unreadable") else visual_key(item, self.hashes))
        except ValueError:
            self._note("media", b"unreadable")

    def _note(self, name: str, content: bytes) -> None:
        self._parts[name].update(len(content).to_bytes(8, "little"))
        self._parts[name].update(content)

    def digests(self) -> dict[str, str]:
        """{"query_texts", "candidate_texts", "media": hex digest}."""
        return {name: part.hexdigest() for name, part in self._parts.items()}


def item_key(item: dict[str, Any], hashes: ContentHashes, prompt: str | None = None) -> bytes:
    """16-byte key of one model input under one prompt.

    Args:
        item: {"text":, "image":, "video":, "instruction":}; a video is a path or a list of frames.
        hashes: a ContentHashes. prompt: what `encode(prompt=)` puts in front, or None.

    Raises: ValueError naming the file that cannot be read.
    """
    item = whole(item)
    if item.get("unreadable"):
        raise ValueError(item["unreadable"])
    digest = _hash()
    text = item.get("text") or ""
    given = [name for name in MEDIA_KEYS if name in item]
    # a side that says "no image" feeds a marker in its text as an ordinary token; without a marker that changes nothing
    marker_is_text = "<|" in text and bool(given) and not any(item[name] for name in given)
    digest.update(json.dumps([prompt, text, item.get("instruction"), marker_is_text]).encode())
    said = {name: item[name] for name in SETTING_KEYS if item.get(name) is not None}  # of this input's media alone
    if item.get("text") is None and not any(_given(item[name]) for name in given):
        said["nothing"] = True  # an embedder may feed an empty text otherwise than none
    if said:
        digest.update(json.dumps(said, sort_keys=True).encode())
    for name in MEDIA_KEYS:
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


def _given(visual: Any) -> bool:
    return visual is not None and not (isinstance(visual, (str, list, tuple)) and not visual)


def weights_digest(module: nn.Module) -> str:
    """Hex digest of a module's parameters and buffers, bytes and names; well below a second per GB: several tensors at once."""
    import torch

    def one(named) -> bytes:
        name, tensor = named
        digest = _hash()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1).contiguous()
        if flat.numel():
            digest.update(flat.cpu().view(torch.uint8).numpy())
        return digest.digest()

    tensors = [(name, tensor) for name, tensor in sorted(module.state_dict().items()) if isinstance(tensor, torch.Tensor)]
    whole = _hash()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for digest in pool.map(one, tensors):
            whole.update(digest)
    return whole.hexdigest()


def model_identity(model: Any, **extra: Any) -> dict[str, Any]:
    """Everything a stored vector depends on besides the input, as a JSON-able dict.

    A model may say it itself: `model.identity()` -> dict. Otherwise: family, digest of the weights, dtype, configuration, adapter,
    the family options in force (image limits, crops, positions), tokenizer and processor, and the named prompts.
    """
    if callable(getattr(model, "identity", None)):
        known = dict(model.identity())
    else:
        processing = getattr(model, "processing", None)
        known = {
            "class": type(model).__name__,
            "family": getattr(model, "family", None),
            "weights": weights_digest(model) if hasattr(model, "state_dict") else None,
            "dtype": str(getattr(model, "dtype", None)),
            "config": _settings(getattr(model, "config", None)),
            "adapter": getattr(model, "adapter_settings", None),
            "options": getattr(model, "options", None),
            "tokenizer": tokenizer_digest(getattr(processing, "tokenizer", None) or getattr(model, "tokenizer", None)),
            "image_processor": _settings(getattr(processing, "image_processor", None)),
            "processor": _settings(getattr(processing, "hf", None)),
            "prompts": getattr(model, "prompts", None),
        }
    return json.loads(json.dumps({**known, "vlm2vec": __version__, **extra}, sort_keys=True, default=_plain))


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Hex digest of what a tokenizer makes of texts: vocabulary, merges, normaliser, added tokens, chat template."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else ""
    named = getattr(tokenizer, "special_tokens_map", None)
    digest = _hash()
    digest.update(json.dumps([content, named, getattr(tokenizer, "chat_template", None)], sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


# Where a configuration came from and in which precision it is run, told elsewhere or not a matter of vectors.
NOT_SETTINGS = {"_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map"}


def _settings(part: Any) -> Any:
    """A configuration or processor as its dictionary, without `NOT_SETTINGS` at any depth; None for what is neither."""

    def kept(value):
        return {k: kept(v) for k, v in value.items() if k not in NOT_SETTINGS} if isinstance(value, dict) else value

    settings = part.to_dict() if hasattr(part, "to_dict") else part
    return kept(settings) if isinstance(settings, dict) else None


def _plain(value: Any) -> Any:
    """What JSON has no word for, the same in every process: sets in order, objects by their content or class and never by address."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text


def identity_digest(identity: dict[str, Any]) -> str:
    """Hex digest that names a model's folder in the store."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
