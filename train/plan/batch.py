"""The batch of a plan: the recipe's first one where its data is at hand, rows as the recipe assumes them where not."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vlm2vec.data.tables import is_local
from vlm2vec.media.images import Undecoded
from vlm2vec.packing import Features

from ..data.rows import PairDataset, collate
from ..data.sampler import BlockSampler
from ..recipe.schema import Content, Recipe

_LARGE = 4096  # pixels; every family has a limit below it


def absent(recipe: Recipe) -> str | None:
    """The first place of the recipe's rows that is not on this machine, as the recipe names it; None where all are."""
    for source in recipe.data.sources:
        if source.path is not None:
            if not is_local(source.path):
                return source.path
        elif not os.path.isdir(source.root or recipe.data.root or ""):
            return source.root or recipe.data.root
    return None


def first_batch(recipe: Recipe, processing: Any, ranks: int, dataset: PairDataset | None = None) -> dict[str, Any]:
    """Rank 0's share of the run's first step."""
    dataset = dataset or PairDataset(recipe.data, processing, recipe.held_out_rows)
    sampler = BlockSampler(
        dataset.sizes,
        [source.weight for source in recipe.data.sources],
        global_batch=recipe.global_batch,
        block=recipe.interleave_batch_size,
        steps=1,
        seed=recipe.seed,
        from_step=[source.from_step for source in recipe.data.sources],
    )
    return collate([dataset[key] for key in sampler.batch(0)[: recipe.global_batch // ranks]])


def assumed_batch(recipe: Recipe, processing: Any, ranks: int) -> dict[str, Any]:
    """A rank's share of a step of the rows that `plan.rows` describes, by their shares."""
    kinds = recipe.plan.rows
    count = recipe.global_batch // ranks
    features = [(_features(processing, kind.query), _features(processing, kind.target)) for kind in kinds]
    samples = []
    for kind, times in zip(range(len(kinds)), _counts([k.share for k in kinds], count), strict=True):
        query, target = features[kind]
        for _ in range(times):
            row = len(samples)
            samples.append(
                {"source": 0, "row": row, "error": None, "query": query, "target": target, "negatives": [], "negative_ids": []}
                | {"query_id": row, "target_id": row}
            )
    return collate(samples)


def _counts(shares: list[float], count: int) -> list[int]:
    """Whole numbers in the proportion of the shares that add up to `count`."""
    exact = [share / sum(shares) * count for share in shares]
    counts = [int(x) for x in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: count - sum(counts)]:
        counts[i] += 1
    return counts


def _features(processing: Any, content: Content) -> Features:
    ids, visuals, pending = [], [], []
    for visual, marker, frames in _visuals(processing, content):
        visuals.append(visual)
        ids.append(marker)
        pending.append([None] * frames)
    features = processing.assemble(ids + [1] * content.text, visuals)
    features.pending = pending if processing.from_headers else []
    return features


def _visuals(processing: Any, content: Content) -> Iterator[tuple[Any, int, int]]:
    """(visual, id of its marker, frames) of each picture and film."""
    if content.image is not None:
        picture = _picture(processing, content.image)
        for _ in range(content.images):
            yield processing.process_image(picture), processing.image_token_id, 1
    if content.video is not None:
        frames, *size = content.video
        yield processing.process_video([_picture(processing, size)] * frames), processing.video_token_id, frames


def _picture(processing: Any, size: list[int]) -> Any:
    if processing.from_headers:
        return Undecoded(None, tuple(size))
    from PIL import Image

    return Image.new("RGB", tuple(size), (128, 128, 128))


def longest(batch: dict[str, Any]) -> int:
    """Tokens of the longest sample."""
    return max(len(sample["input_ids"]) for name in ("query", "target", "negatives") for sample in batch[name])


def longest_possible(recipe: Recipe, processing: Any) -> int:
    """Tokens of the longest sample that real rows may hold where assumed ones stand for them: its pictures as large as the model takes,
    its text four times as long."""
    if recipe.plan is None or not processing.from_headers:
        return 0
    contents = [content for kind in recipe.plan.rows for content in (kind.query, kind.target)]
    pictured = [
        replace(content, image=[_LARGE, _LARGE * sixteenth // 16], text=4 * content.text)
        for content in contents
        if content.image is not None
        for sixteenth in range(4, 17)
    ]
    return max((len(_features(processing, content).input_ids) for content in pictured), default=0)


def tokens(batch: dict[str, Any]) -> int:
    return sum(len(sample["input_ids"]) for name in ("query", "target", "negatives") for sample in batch[name])


def decoded_total(processing: Any, batch: dict[str, Any]) -> tuple[int, int]:
    """(bytes of a batch's decoded images, bytes of the largest of them); images that come decoded count as they are."""
    from ..data.rows import to_features

    sizes = []
    known: dict[int, int] = {}
    for name in ("query", "target", "negatives"):
        for sample in batch[name]:
            if not sample["vision"]:
                continue
            grid = sample["vision"].get("grid_thw")
            key = id(sample) if grid is None else (grid.tobytes(), len(sample["pending"]))
            if key not in known:
                if sample["pending"]:
                    known[key] = math.prod(processing.decoded_shape(to_features(sample)))
                else:
                    known[key] = sum(v.nbytes for v in sample["vision"].values() if hasattr(v, "nbytes"))
            sizes.append(known[key])
    return sum(sizes), max(sizes, default=0)


def is_measured(batch: dict[str, Any]) -> bool:
    """Whether images are decoded by the chunk, under the bound on host memory."""
    return all(sample["pending"] or not sample["vision"] for name in ("query", "target", "negatives") for sample in batch[name])
