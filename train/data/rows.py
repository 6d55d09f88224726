"""Training rows: rows of a recipe's sources in, tokenised samples out, images measured but not decoded where the family allows it.

Runs in data-loader workers, without weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from vlm2vec.inputs import NOTHING
from vlm2vec.packing import Features

from ..recipe.schema import Data
from .contents import content_id
from .groups import NO_GROUP, group_id, split
from .sources import open_source

logger = logging.getLogger(__name__)


class PairDataset(torch.utils.data.Dataset):
    """Rows of all sources of a recipe, indexed by (source, row).

    Args:
        data: the recipe's data section.
        processing: the model's (`vlm2vec.backbones.processing`), picklable.
        held_out: how many of each source's last rows to keep out of training, at most a tenth of it, whole groups where it has
            groups (`train.data.groups`); see `held_out_rows`.

    A source's positions count the rows that are trained on first, then those held out; without groups they are its rows.

    A row that cannot be read keeps its place in the batch with `error` set, and is left out of the loss by the
    trainer; with `data.strict` it raises.
    """

    def __init__(self, data: Data, processing: Any, held_out: int = 0):
        self.data = data
        self.processing = processing
        self.tables = [open_source(data, source) for source in data.sources]
        options = processing.options  # by frames a second a folder of frames is used whole, up to its maximum
        self.frames = options["frames"] if options["fps"] is None else options["max_frames"]
        self._splits = split(self.tables, [source.name for source in data.sources], held_out)
        self._placeholder: Features | None = None

    @property
    def sizes(self) -> list[int]:
        """Rows of each source that are trained on."""
        return [part.trained for part in self._splits]

    def held_out_rows(self) -> list[range]:
        """Positions of each source's rows that are not."""
        return [range(part.trained, part.trained + part.held) for part in self._splits]

    def row(self, source: int, position: int) -> int:
        """The row of a source's data at a position."""
        return self._splits[source].row(position)

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return self.sample(key[0], self.row(*key))

    def sample(self, source: int, row: int) -> dict[str, Any]:
        """Row `row` of a source's data, whatever its position."""
        name = self.data.sources[source].name
        sample: dict[str, Any] = {"source": source, "row": row, "error": None}
        ids, labels = (-1, -1, []), {}
        try:
            table = self.tables[source]
            query, target, negatives = table.row(row, self.frames)
            negatives = negatives if self.data.hard_negatives else []
            labels = table.labels(row, 1 + len(negatives))
            if table.group:
                labels["group_id"] = group_id(table.group, table.group_of(row))
            labels["pair"] = 3 * _kind(query) + _kind(target)
            sample["query"], sample["target"] = self.processing.measure(query), self.processing.measure(target)
            sample["negatives"] = [self.processing.measure(negative) for negative in negatives]
            first, second, *others = [content_id(item, by_bytes=table.is_own) for item in (query, target, *negatives)]  # all are readable
            ids = (first, second, others)
        except Exception as error:  # Pillow's plugins and rows of a wrong shape raise whatever comes: struct.error, EOFError, KeyError
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            message = " ".join(f"{name}, row {row}: {kind}{error}".split())
            if self.data.strict:
                raise ValueError(f"{message}; mend or remove the row, or set data.strict to false to leave it out") from error
            sample.update(query=self._blank(), target=self._blank(), negatives=[], error=message)
            ids, labels = (-1, -1, []), {}
        sample["query_id"], sample["target_id"] = ids[:2]
        sample["negative_ids"] = ids[2] if sample["negatives"] else []
        return sample | labels

    def _blank(self) -> Features:
        if self._placeholder is None:
            self._placeholder = self.processing(NOTHING)
        return self._placeholder


def _kind(item: dict[str, Any]) -> int:
    """Place in `train.losses.base.KINDS` of what an item shows."""
    return 2 if item.get("video") else 1 if item.get("image") else 0


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
        "group_ids": np.array([s.get("group_id", NO_GROUP) for s in samples], dtype=np.int64),
        "hard_ids": np.array([i for s in samples for i in s["negative_ids"]], dtype=np.int64),
        "pairs": np.array([s.get("pair", 0) for s in samples], dtype=np.int64),
        **_labels(samples),
        "kept": np.array([s["error"] is None for s in samples]),
        "errors": [s["error"] for s in samples if s["error"]],
        "rows": [(s["source"], s["row"]) for s in samples],
    }


def _labels(samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """`grades` (N,) and `scores` (N, 1 + most negatives), where any row has them: NaN in rows without, scores end with -inf."""
    found = {}
    if any("grade" in s for s in samples):
        found["grades"] = np.array([s.get("grade", np.nan) for s in samples], dtype=np.float32)
    if any("scores" in s for s in samples):
        width = max(len(s["scores"]) for s in samples if "scores" in s)
        scores = np.full((len(samples), width), np.nan, dtype=np.float32)
        for row, sample in enumerate(samples):
            if "scores" in sample:
                scores[row] = -np.inf
                scores[row, : len(sample["scores"])] = sample["scores"]
        found["scores"] = scores
    return found


def longest_sample(batch: dict[str, Any]) -> tuple[tuple[int, int], int]:
    """((source, row), tokens) of the longest sample of a collated batch."""
    tokens, at = max((len(f["input_ids"]), at) for side in ("query", "target") for at, f in enumerate(batch[side]))
    for negative, f in enumerate(batch["negatives"]):
        if len(f["input_ids"]) > tokens:
            tokens, at = len(f["input_ids"]), int(np.searchsorted(batch["hard_offsets"], negative, side="right")) - 1
    return tuple(batch["rows"][at]), tokens


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
