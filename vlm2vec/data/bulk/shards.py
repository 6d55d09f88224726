"""A folder of shards: what one holds, and how one is written and read.

DIR/settings.json            the model and how inputs are said; another run must have the same
DIR/shard-00000.safetensors  "embeddings" (n, D) float32; metadata "keys", "inputs" (digest), "left_out", "checksum"; or
DIR/shard-00000.parquet      columns key, embedding; the same metadata
DIR/embeddings.json          written when every shard is there: how many inputs, which files, the digest of each one's inputs; it goes
                             before a shard is replaced
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlm2vec.files import replacing
from vlm2vec.files.documents import read_object

SETTINGS, COMPLETE = "settings.json", "embeddings.json"
FORMATS = ("safetensors", "parquet")
NAME = re.compile(r"shard-(\d+)\.(safetensors|parquet)")


@dataclass
class Shard:
    """Vectors and what tells whose they are.

    Attributes:
        keys: of the n rows. embeddings: (n, D) float32 on the CPU.
        inputs: digest of all inputs that the shard is of, those left out too. left_out: {key: why}.
    """

    keys: list[str]
    embeddings: torch.Tensor
    inputs: str
    left_out: dict[str, str] = field(default_factory=dict)


def shard_name(number: int, kind: str) -> str:
    """The file's name."""
    return f"shard-{number:05d}.{kind}"


def numbers(folder: Path) -> dict[int, str]:
    """{number: name} of the shards that are there."""
    found = (NAME.fullmatch(name) for name in os.listdir(folder)) if folder.is_dir() else ()
    return {int(one[1]): one[0] for one in found if one}


def checksum(embeddings: torch.Tensor) -> str:
    """Hex digest of the numbers."""
    return hashlib.blake2b(embeddings.contiguous().numpy(), digest_size=16).hexdigest()


def write_shard(path: Path, shard: Shard, about: dict[str, str]) -> None:
    """Write a shard, whole and on disk when this returns.

    Args:
        about: what else its metadata says.
    """
    embeddings = shard.embeddings.contiguous()
    told = {**about, "inputs": shard.inputs, "left_out": json.dumps(shard.left_out), "checksum": checksum(embeddings)}
    with replacing(path) as part:
        if path.suffix == ".parquet":
            _write_parquet(part, shard.keys, embeddings, told)
        else:
            from safetensors.torch import save_file

            save_file({"embeddings": embeddings}, part, metadata={"keys": json.dumps(shard.keys), **told})


def _write_parquet(part: Path, keys: list[str], embeddings: torch.Tensor, told: dict[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = pa.array(embeddings.numpy().reshape(-1))
    rows = pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
    table = pa.table({"key": pa.array(keys, pa.string()), "embedding": rows})
    pq.write_table(table.replace_schema_metadata(told), part, compression="zstd")


def told_inputs(path: Path) -> str:
    """The digest of the inputs that a shard is of. ValueError where it does not read back."""
    return _open(path)[1].get("inputs", "")


def read_shard(path: Path) -> Shard:
    """A shard, its numbers held to their checksum. ValueError where they are not what was written."""
    read, about = _open(path)
    keys, embeddings = read()
    if about.get("checksum") != checksum(embeddings) or len(keys) != len(embeddings):
        raise ValueError(f"{path} is damaged (its numbers are not those that were written); remove it, and run the same command again")
    return Shard(keys, embeddings, about.get("inputs", ""), json.loads(about.get("left_out", "{}")))


def _open(path: Path) -> tuple[Any, dict[str, str]]:
    """(what reads keys and embeddings, metadata)."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            table = pq.ParquetFile(path)
            return lambda: _parquet_content(table), {k.decode(): v.decode() for k, v in (table.schema_arrow.metadata or {}).items()}
        from safetensors import safe_open

        with safe_open(path, "pt") as f:
            about = f.metadata() or {}
        return lambda: _safetensors_content(path, about), about
    except Exception as e:  # each library's own errors, of a file that is cut or none of theirs
        raise ValueError(f"{path} does not read back ({' '.join(str(e).split())[:200]}); remove it, and run the same command again") from e


def _safetensors_content(path: Path, about: dict[str, str]) -> tuple[list[str], torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        return json.loads(about["keys"]), f.get_tensor("embeddings")


def _parquet_content(table: Any) -> tuple[list[str], torch.Tensor]:
    read = table.read()
    width = read.schema.field("embedding").type.list_size
    values = read.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return read.column("key").to_pylist(), torch.from_numpy(values.copy()).reshape(-1, width)


def read_shards(folder: str | os.PathLike) -> tuple[list[Shard], dict[str, Any]]:
    """(shards in order, what settings.json says) of a folder that is complete.

    Raises:
        ValueError: no such folder, not complete, damaged; names the file.
    """
    folder = Path(folder)
    if not (folder / COMPLETE).is_file():
        raise ValueError(f"{folder}: no complete set of shards in it; run vlm2vec embed ... --shards {folder} to its end")
    told = read_object(folder / COMPLETE)
    names, digests = told.get("shards"), told.get("digests")
    if not isinstance(names, list) or not isinstance(digests, list) or len(names) != len(digests):
        raise ValueError(f"{folder / COMPLETE}: expected shards and digests, as many; run the vlm2vec embed that made it again")
    shards = [read_shard(folder / name) for name in names]
    for name, digest, shard in zip(names, digests, shards):
        if shard.inputs != digest:
            raise ValueError(f"{folder / name} is of other inputs than {COMPLETE} says; run the vlm2vec embed that made it again")
    return shards, read_object(folder / SETTINGS)
