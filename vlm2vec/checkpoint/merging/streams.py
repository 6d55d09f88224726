"""Safetensors of a model's folder, read and written tensor by tensor."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from vlm2vec.checkpoint import loading
from vlm2vec.files import write_json
from vlm2vec.files.documents import read_object

INDEX = "model.safetensors.index.json"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


class Weights:
    """The tensors of a full checkpoint, by name; each is read when it is asked for.

    Args:
        source: folder or hub name. unused: patterns of names that the embedding model does not have.

    Attributes:
        files: {file name: names of its tensors}. shapes: {name: (dtype, shape)}.
    """

    def __init__(self, source: str, unused: Iterable[str] = ()):
        from safetensors import SafetensorError, safe_open

        self.source = source
        patterns = [re.compile(pattern) for pattern in unused]
        self.files: dict[str, list[str]] = {}
        self.shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._of: dict[str, object] = {}
        for name in self._file_names():
            path = loading.file_of(source, name)
            try:
                opened = safe_open(path, "pt")
                held = sorted(key for key in opened.keys() if not any(pattern.search(key) for pattern in patterns))
                slices = {key: opened.get_slice(key) for key in held}
                told = {key: (_TYPES[part.get_dtype()], tuple(part.get_shape())) for key, part in slices.items()}
            except (SafetensorError, OSError, KeyError, TypeError) as error:
                raise ValueError(f"{source}: {name} cannot be read ({str(error)[:150]}); copy or download it again") from error
            self.files[name] = held
            self.shapes |= told
            self._of |= dict.fromkeys(held, opened)

    def _file_names(self) -> list[str]:
        index = loading.file_of(self.source, INDEX)
        if index is not None:
            placed = read_object(index).get("weight_map")
            if not isinstance(placed, dict):
                raise ValueError(f"{self.source}: {INDEX} has no weight_map; expected the file of each tensor: copy the folder again")
            return sorted(set(placed.values()))
        if loading.file_of(self.source, "model.safetensors") is None:
            raise ValueError(f"{self.source}: expected model.safetensors or {INDEX}, got neither; save the model as safetensors")
        return ["model.safetensors"]

    def get(self, name: str) -> torch.Tensor:
        return self._of[name].get_tensor(name)


def require_alike(first: Weights, other: Weights) -> None:
    """ValueError where two checkpoints have other tensors, or of other shapes."""
    for one, two in ((first, other), (other, first)):
        lacking = [name for name in one.shapes if name not in two.shapes]
        if lacking:
            raise ValueError(
                f"expected the same tensors in {one.source} and {two.source}, got {len(lacking)} that {two.source} lacks: "
                f"{loading.some(lacking)}; are they of one base?"
            )
    other_shapes = [name for name, (_, shape) in first.shapes.items() if other.shapes[name][1] != shape]
    if other_shapes:
        name = other_shapes[0]
        raise ValueError(
            f"expected tensors of the same shapes in {first.source} and {other.source}, got {len(other_shapes)} of other ones: {name} is "
            f"{first.shapes[name][1]} and {other.shapes[name][1]}; are they of one base?"
        )


def write_like(first: Weights, folder: Path, make: Callable[[str], torch.Tensor]) -> None:
    """Files of the names that `first` has, filled with what `make(name)` gives, in `first`'s dtypes and shapes."""
    for name, held in first.files.items():
        _write_file(folder / name, {key: first.shapes[key] for key in held}, make)
    if list(first.files) != ["model.safetensors"]:
        sizes = (torch.Size(shape).numel() * dtype.itemsize for dtype, shape in first.shapes.values())
        placed = {key: name for name, held in first.files.items() for key in held}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(placed.items()))}, durable=False)


def _write_file(path: Path, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]], make: Callable[[str], torch.Tensor]) -> None:
    """The format: 8 bytes of the header's length, the header as JSON with each tensor's place, the tensors."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in shapes.items():
            tensor = make(name).to(dtype).reshape(shape).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
