"""Training rows: MMEB's columns in, tokenised samples out, images measured but not decoded where the family allows it.

Runs in data-loader workers, without weights.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.recipe import Data
from vlm2vec.data.mmeb import read_train, to_item
from vlm2vec.packing import Features

logger = logging.getLogger(__name__)


class PairDataset(torch.utils.data.Dataset):
    """Rows of all sources of a recipe, indexed by (source, row).

    Args:
        data: the recipe's data section.
        processing: the model's (`vlm2vec.backbones.processing`), picklable.

    A row that cannot be read keeps its place in the batch with `error` set, and is left out of the loss by the
    trainer; with `data.strict` it raises.
    """

    def __init__(self, data: Data, processing: Any):
        self.data = data
        self.processing = processing
        self.tables = []
        for source in data.sources:
            table = read_train(data.root, source.name, split=data.split)
            if source.rows is not None:
                table = table.select(range(min(source.rows, len(table))))
            self.tables.append(table)
        self._placeholder: Features | None = None

    @property
    def sizes(self) -> list[int]:
        return [len(table) for table in self.tables]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        source, row = key
        values = self.tables[source][row]
        name = self.data.sources[source].name
        sample: dict[str, Any] = {"source": source, "row": row, "error": None}
        try:
            sample["query"] = self._features(values["qry"], values["qry_image_path"])
            sample["target"] = self._features(values["pos_text"], values["pos_image_path"])
            sample["negatives"] = [self._features(*pair) for pair in _negatives(values)] if self.data.hard_negatives else []
        except (ValueError, OSError) as error:
            message = f"{name}, row {row}: {error}"
            if self.data.strict:
                raise ValueError(f"{message}; mend or remove the row, or set data.strict to false to leave it out") from error
            sample.update(query=self._blank(), target=self._blank(), negatives=[], error=message)
        sample["query_id"] = content_id(values["qry"], values["qry_image_path"])
        sample["target_id"] = content_id(values["pos_text"], values["pos_image_path"])
        sample["negative_ids"] = [content_id(*pair) for pair in _negatives(values)] if sample["negatives"] else []
        return sample

    def _features(self, text: str, image: str) -> Features:
        return self.processing.measure(to_item(text, image, self.data.images))

    def _blank(self) -> Features:
        if self._placeholder is None:
            self._placeholder = self.processing("  ")  # what the reference feeds for a missing example
        return self._placeholder


def _negatives(values: dict[str, Any]) -> list[tuple[str, str]]:
    texts, images = values.get("neg_text") or "", values.get("neg_image_path") or ""
    texts = texts if isinstance(texts, list) else [texts]
    images = images if isinstance(images, list) else [images]
    count = max(len(texts), len(images))
    texts, images = texts + [""] * (count - len(texts)), images + [""] * (count - len(images))
    return [pair for pair in zip(texts, images, strict=True) if any(pair)]


def content_id(text: str, image: str) -> int:
    """The same non-negative 63-bit number for the same content, on every rank and in every run."""
    digest = hashlib.blake2b(f"{text}\0{Path(image).as_posix() if image else ''}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A rank's share of a step. Arrays instead of tensors: they cross from a worker without a file descriptor each."""
    negatives = [f for s in samples for f in s["negatives"]]
    return {
        "query": [_to_arrays(s["query"]) for s in samples],
        "target": [_to_arrays(s["target"]) for s in samples],
        "negatives": [_to_arrays(f) for f in negatives],
        "hard_offsets": np.cumsum([0] + [len(s["negatives"]) for s in samples]),
        "query_ids": np.array([s["query_id"] for s in samples], dtype=np.int64),
        "target_ids": np.array([s["target_id"] for s in samples], dtype=np.int64),
        "hard_ids": np.array([i for s in samples for i in s["negative_ids"]], dtype=np.int64),
        "kept": np.array([s["error"] is None for s in samples]),
        "errors": [s["error"] for s in samples if s["error"]],
        "rows": [(s["source"], s["row"]) for s in samples],
    }


_INDICES = ("input_ids", "visual_index")


def _to_arrays(features: Features) -> dict[str, Any]:
    arrays = {field.name: _map_tensors(getattr(features, field.name), torch.Tensor, torch.Tensor.numpy) for field in fields(features)}
    for name in _INDICES:  # a batch of 32,768 images of 1,225 tokens is 640 MB of int64 in these two
        if arrays[name] is not None:
            arrays[name] = arrays[name].astype(np.int32)
    return arrays


def to_features(arrays: dict[str, Any]) -> Features:
    """The sample that `collate` took apart; shares its memory but for the token indices."""
    values = {name: _map_tensors(value, np.ndarray, torch.from_numpy) for name, value in arrays.items()}
    return Features(**values | {name: values[name].long() for name in _INDICES if values[name] is not None})


def _map_tensors(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, dict):
        return {name: _map_tensors(entry, kind, convert) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(entry, kind, convert) for entry in value)
    return value
