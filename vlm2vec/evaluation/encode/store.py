"""Embeddings on disk: safetensors shards that carry their own keys.

    STORE/{model digest}/identity.json                what the vectors depend on, for people
    STORE/{model digest}/shard-{digest}.safetensors   "embeddings" (n, D) float32, "keys" (n, 16) uint8, metadata "checksum"
    STORE/{model digest}/cut-{digest}.json            keys of inputs whose texts were cut to the model's limit

The keys in the shards are the index; it is rebuilt by reading them when the store is opened. Shards are written to a temporary
name and renamed, so a shard exists whole or not at all; one that does not read back (cut short by a full disk, say), whose content
is not what its checksum says, or that holds numbers that are not finite, is set aside as *.broken, counted, and encoded again.
A changed model, tokenizer, image limit or library version has another digest; a changed prompt, text or picture has another key.
Several runs may fill one store: what two of them encode at once has one name and one content.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vlm2vec.evaluation.encode.keys import DIGEST, identity_digest
from vlm2vec.files import AnyPath, replacing, write_json
from vlm2vec.files.documents import parse_json, read_text


def checksum(embeddings: torch.Tensor, keys: torch.Tensor) -> str:
    """Hex digest of a shard's numbers, (n, D) float32 and (n, 16) uint8 on the CPU."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (embeddings, keys):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


class EmbeddingStore:
    """Read and append embeddings of one model.

    Args:
        folder: the store; several models may share it.
        identity: from `keys.model_identity`.
    """

    def __init__(self, folder: AnyPath, identity: dict[str, Any]):
        self.folder = Path(folder) / identity_digest(identity)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "identity.json").exists():
            write_json(self.folder / "identity.json", identity)
        self.index = {}
        self.broken = []
        self._seen = set()
        self._verified = set()
        self.cut: set[bytes] = set()
        self.dim = None
        self.refresh()

    def refresh(self) -> None:
        """Read the keys of shards that appeared since (other processes write into the same folder)."""
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            if path.name not in self._seen:
                self._open(path)
        for path in sorted(self.folder.glob("cut-*.json")):
            if path.name not in self._seen:
                self._seen.add(path.name)
                self.cut.update(bytes.fromhex(key) for key in parse_json(read_text(path), str(path)))

    def _open(self, path):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as shard:
                keys = shard.get_tensor("keys")
                rows, dim = shard.get_slice("embeddings").get_shape()
            if keys.shape != (rows, DIGEST) or keys.dtype != torch.uint8:
                raise ValueError(f"{len(keys)} keys for {rows} vectors")
        except (SafetensorError, ValueError, OSError) as error:
            self._set_aside(path, error)
            return
        self._seen.add(path.name)
        self.dim = dim
        raw = keys.numpy().tobytes()
        for row in range(rows):
            self.index.setdefault(raw[row * DIGEST : (row + 1) * DIGEST], (path.name, row))

    def _set_aside(self, path, reason):
        try:
            os.replace(path, path.with_suffix(".broken"))
        except FileNotFoundError:  # another process has set it aside
            return
        self.broken.append(f"{path}: {reason}")

    def verify(self, keys: Iterable[bytes]) -> None:
        """Read the shards of `keys` once. What is not as it was written is no longer in the store, and is named in `broken`."""
        names = {self.index[key][0] for key in keys if key in self.index}
        for name in sorted(names - self._verified):
            try:
                self._read(name)
            except ValueError as error:
                self._set_aside(self.folder / name, error)
                self.index = {key: place for key, place in self.index.items() if place[0] != name}
                self._seen.discard(name)

    def _read(self, name: str) -> torch.Tensor:
        """A shard's vectors (n, D), their checksum compared once. ValueError says what is wrong with it."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / name, framework="pt") as shard:
                embeddings, told = shard.get_tensor("embeddings"), (shard.metadata() or {}).get("checksum")
                if name not in self._verified and told != checksum(embeddings, shard.get_tensor("keys")):
                    raise ValueError("its content is not what was written (the checksum differs)")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"does not read back ({error})") from error
        if name not in self._verified and not bool(torch.isfinite(embeddings).all()):
            raise ValueError("holds numbers that are not finite")
        self._verified.add(name)
        return embeddings

    def __contains__(self, key: bytes) -> bool:
        return key in self.index

    def __len__(self) -> int:
        return len(self.index)

    def add(self, keys: list[bytes], embeddings: torch.Tensor) -> None:
        """Write one shard.

        Args: keys, n 16-byte keys; embeddings, (n, D) float tensor.
        Raises: ValueError when a vector is not finite (index named) or the width differs from what is stored.
        """
        from safetensors.torch import save_file

        embeddings = embeddings.detach().to("cpu", torch.float32).contiguous()
        if len(keys) != len(embeddings):
            raise ValueError(f"expected one embedding per input, got {len(embeddings)} for {len(keys)}")
        if self.dim is not None and embeddings.shape[1] != self.dim:
            raise ValueError(f"the store {self.folder} holds vectors of width {self.dim}, got {embeddings.shape[1]}")
        raw = b"".join(keys)
        name = f"shard-{hashlib.blake2b(raw, digest_size=12).hexdigest()}.safetensors"
        table = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(len(keys), DIGEST)
        broken = (~torch.isfinite(embeddings).all(dim=1)).nonzero()[:, 0].tolist()
        if broken:
            raise ValueError(f"vector {broken[0]} of {len(keys)} is not finite, and is not stored; look at the model's weights and dtype")
        with replacing(self.folder / name) as part:
            save_file({"embeddings": embeddings, "keys": table}, part, metadata={"checksum": checksum(embeddings, table)})
        self._open(self.folder / name)

    def note_cut(self, keys: list[bytes]) -> None:
        """Keep that the texts of these inputs were cut; before their vectors are added, so that a killed run's are counted too."""
        if keys:
            name = hashlib.blake2b(b"".join(keys), digest_size=12).hexdigest()
            write_json(self.folder / f"cut-{name}.json", [key.hex() for key in keys])
            self.cut.update(keys)

    def get(self, keys: list[bytes]) -> torch.Tensor:
        """(len(keys), D) float32 vectors, in the order of `keys`; KeyError for one that is not stored.

        Reads each shard once, one at a time: memory is the result plus one shard. ValueError names a shard that is not as it was
        written.
        """
        wanted = {}
        for place, key in enumerate(keys):
            name, row = self.index[key]
            wanted.setdefault(name, []).append((place, row))
        out = torch.empty(len(keys), self.dim or 0)
        for name, pairs in wanted.items():
            places, rows = zip(*pairs)
            try:
                out[list(places)] = self._read(name)[list(rows)]
            except ValueError as error:
                raise ValueError(f"{self.folder / name} {error}; remove it, and the next run encodes its inputs again") from error
        return out
