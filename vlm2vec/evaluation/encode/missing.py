"""From inputs to stored embeddings: what is missing is encoded, shard by shard, each distinct input once.

The plan is a pure function of the set of inputs: sorted by visuals, text length and key, cut into shards, shards dealt
to the processes in turn. Task order, the number of processes and earlier kills change neither batches nor vectors.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm2vec.evaluation.encode.encoder import Encoder
from vlm2vec.evaluation.encode.keys import ContentHashes, visual_key
from vlm2vec.evaluation.tasks.task_data import whole
from vlm2vec.files import AnyPath, write_json
from vlm2vec.media.sampling import FRAMES

if TYPE_CHECKING:
    from vlm2vec.evaluation.encode.store import EmbeddingStore


SHARD_COST = 2048  # a text costs 4, an image 32, a video frame 32: about 500 texts or 55 pictures in a shard; two are in memory


def visuals_of(item: dict[str, Any]) -> tuple[int, int]:
    """(images, video frames) of an input; a video file that is not split yet counts as the frames that are taken of it, and a sound as
    an image."""
    images, videos = item.get("image") or [], item.get("video") or []
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    images += [item["audio"]] if item.get("audio") is not None else []
    frames = len(videos) if isinstance(videos, (list, tuple)) else FRAMES
    return len(images), frames


def cost_of(item: dict[str, Any]) -> int:
    """Rough cost of encoding, in the units of SHARD_COST."""
    images, frames = visuals_of(item)
    return 4 + len(item.get("text") or "") // 64 + 32 * (images + frames)


def shape_of(item: dict[str, Any], hashes: ContentHashes) -> tuple[int, bytes, int, int]:
    """(visuals, their content, characters, cost) of an input, which is read once for it."""
    item = whole(item)
    return sum(visuals_of(item)), visual_key(item, hashes), len(item.get("text") or ""), cost_of(item)


def plan_shards(
    items: dict[bytes, dict[str, Any]],
    shard_cost: int = SHARD_COST,
    hashes: ContentHashes | None = None,
    shapes: dict[bytes, tuple[int, bytes, int, int]] | None = None,
) -> list[list[bytes]]:
    """Lists of keys. `items` is {key: input}; the plan depends on the set alone, not on its order.

    Inputs with the same picture stand together, texts by length. `shapes` are those of the items (`shape_of`), where they are known.
    """
    hashes = hashes or ContentHashes()
    shapes = shapes or {key: shape_of(item, hashes) for key, item in items.items()}
    shards, cost = [], 0
    for key in sorted(items, key=lambda key: (*shapes[key][:3], key)):
        item_cost = shapes[key][3]
        if not shards or cost + item_cost > shard_cost:
            shards.append([])
            cost = 0
        shards[-1].append(key)
        cost += item_cost
    return shards


def fill_store(
    model: Any,
    store: EmbeddingStore,
    items: dict[bytes, dict[str, Any]],
    *,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 32,
    prompt: str | None = None,
    shard_cost: int = SHARD_COST,
    progress: bool = True,
    workers: int | None = None,
    hashes: ContentHashes | None = None,
) -> dict[bytes, str]:
    """Encode this process's share of what the store lacks.

    Args:
        items: {key: input} over all tasks. rank, world: shard i belongs to process i % world.
        prompt: passed to encode; it must already be part of the keys. workers: threads that decode and preprocess.
        hashes: a ContentHashes that already knows the files.

    Returns: {key: reason} of inputs that cannot be decoded. Raises ValueError naming an input whose vector is not finite.
    """
    from tqdm import tqdm

    hashes = hashes or ContentHashes()
    store.verify(items)
    shapes = {key: shape_of(item, hashes) for key, item in items.items()}
    shards = [[key for key in shard if key not in store] for shard in plan_shards(items, shard_cost, hashes, shapes)[rank::world]]
    shards = [shard for shard in shards if shard]
    missing = sum(map(len, shards))
    bar = tqdm(
        total=missing,
        unit="input",
        desc="encode",
        file=sys.stderr,
        disable=not progress or rank != 0 or not missing or not sys.stderr.isatty(),
    )
    unreadable = {}
    from vlm2vec.encoding import NOT_FINITE, evaluating

    with evaluating(model), bar:
        encoder = Encoder(model, batch_size, prompt, workers)
        inputs = [[items[key] for key in shard] for shard in shards]
        groups = [[shapes[key][1] for key in shard] for shard in shards]
        for keys, (good, vectors, failures) in zip(shards, encoder.run(inputs, groups)):
            for i, reason in failures.items():
                unreadable[keys[i]] = reason
            finite = torch.isfinite(vectors).all(dim=1)
            if not bool(finite.all()):
                worst = items[keys[good[int((~finite).nonzero()[0])]]]
                raise ValueError(f"{short_name(worst)}: {NOT_FINITE}")
            store.note_cut([keys[row] for row in encoder.cut])
            if good:
                store.add([keys[i] for i in good], vectors)
            bar.update(len(keys))
    return unreadable


def short_name(item: dict[str, Any]) -> str:
    """A short name of an input for messages."""
    visual = item.get("image") or item.get("video") or ""
    visual = visual if isinstance(visual, (str, os.PathLike)) else type(visual).__name__
    text = (item.get("text") or "").replace("\n", " ")
    return " ".join(part for part in (str(visual), repr(text[:60]) if text else "") if part)


def unreadable_file(store: EmbeddingStore, run: AnyPath, rank: int) -> Path:
    """Where a process leaves its failures for the others of its run; a store may serve several runs, known by their output folders."""
    name = hashlib.blake2b(os.path.realpath(run).encode(), digest_size=8).hexdigest()
    return store.folder / f"unreadable-{name}-{rank}.json"


def share_unreadable(store: EmbeddingStore, run: AnyPath, unreadable: dict[bytes, str], rank: int) -> None:
    """Write this process's failures (plain JSON; nothing is unpickled)."""
    write_json(unreadable_file(store, run, rank), {key.hex(): reason for key, reason in unreadable.items()})


def collect_unreadable(store: EmbeddingStore, run: AnyPath, world: int) -> dict[bytes, str]:
    """{key: reason} over all processes of a run."""
    reasons = {}
    for rank in range(world):
        told = json.loads(unreadable_file(store, run, rank).read_text(encoding="utf-8"))
        reasons.update({bytes.fromhex(key): reason for key, reason in told.items()})
    return reasons
