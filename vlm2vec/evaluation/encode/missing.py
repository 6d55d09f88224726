"""From inputs to stored embeddings: what is missing is encoded, shard by shard, each distinct input once.

The plan is a pure function of the set of inputs: sorted by visuals, text length and key, cut into shards, shards dealt
to the processes in turn. Task order, the number of processes and earlier kills change neither batches nor vectors.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm2vec.evaluation.encode.keys import ContentHashes
from vlm2vec.files import AnyPath, write_json
from vlm2vec.inputs import VISUAL_KEYS
from vlm2vec.media.sampling import FRAMES

if TYPE_CHECKING:
    from vlm2vec.evaluation.encode.store import EmbeddingStore


SHARD_COST = 2048  # a text costs 4, an image 32, a video frame 32: about 500 texts or 55 pictures in a shard; two are in memory


def visuals_of(item: dict[str, Any]) -> tuple[int, int]:
    """(images, video frames) of an input; a video file that is not split yet counts as the frames that are taken of it."""
    images, videos = item.get("image") or [], item.get("video") or []
    images = images if isinstance(images, (list, tuple)) else [images]
    frames = len(videos) if isinstance(videos, (list, tuple)) else FRAMES
    return len(images), frames


def cost_of(item: dict[str, Any]) -> int:
    """Rough cost of encoding, in the units of SHARD_COST."""
    images, frames = visuals_of(item)
    return 4 + len(item.get("text") or "") // 64 + 32 * (images + frames)


def visual_key(item: dict[str, Any], hashes: ContentHashes) -> bytes:
    """Content of an input's visuals, b"" without any; inputs that share it share the vision tower's work."""
    digests = []
    for name in VISUAL_KEYS:
        value = item.get(name) or []
        for visual in value if isinstance(value, (list, tuple)) else [value]:
            digests += [hashes.of(frame) for frame in (visual if isinstance(visual, (list, tuple)) else [visual])]
    return b"".join(digests)


def plan_shards(items: dict[bytes, dict[str, Any]], shard_cost: int = SHARD_COST, hashes: ContentHashes | None = None) -> list[list[bytes]]:
    """Lists of keys. `items` is {key: input}; the plan depends on the set alone, not on its order.

    Inputs with the same picture stand together, texts by length.
    """
    hashes = hashes or ContentHashes()

    def order(key):
        images, frames = visuals_of(items[key])
        return (images + frames, visual_key(items[key], hashes), len(items[key].get("text") or ""), key)

    shards, cost = [], 0
    for key in sorted(items, key=order):
        item_cost = cost_of(items[key])
        if not shards or cost + item_cost > shard_cost:
            shards.append([])
            cost = 0
        shards[-1].append(key)
        cost += item_cost
    return shards


def _encode(model, inputs, batch_size, prompt):
    """`model.encode` for models that are not VLM2Vec; what cannot be decoded is found one by one."""
    options = {"batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": False}
    if prompt is not None:
        options["prompt"] = prompt
    try:
        return list(range(len(inputs))), torch.as_tensor(model.encode(inputs, **options)), {}
    except (ValueError, OSError) as error:
        failures = {}
        for i, item in enumerate(inputs):
            try:
                model.preprocess([item])
            except (ValueError, OSError) as reason:
                failures[i] = str(reason)
        if not failures:
            raise error
    good = [i for i in range(len(inputs)) if i not in failures]
    vectors = torch.as_tensor(model.encode([inputs[i] for i in good], **options)) if good else torch.empty(0, 0)
    return good, vectors, failures


class Encoder:
    """Shard after shard: while the model runs on one, threads decode and preprocess the next.

    The vision tower runs once per distinct picture of a shard, however many instructions go with it. `run` takes the shards
    and, beside each input, the content key of its visuals.

    Yields of `run`: (good, vectors, failures) per shard: indices that were encoded, their (n, D) vectors, {index: reason} of
    inputs that cannot be decoded. An error that no single input explains is raised as it came.
    """

    def __init__(self, model: Any, batch_size: int = 32, prompt: str | None = None, workers: int | None = None):
        self.model, self.batch_size, self.prompt = model, batch_size, prompt
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.staged = hasattr(model, "processing") and hasattr(model, "pack")

    def _features(self, item):
        try:
            return self.model.processing(item)
        except (ValueError, OSError) as reason:
            return str(reason)

    def run(
        self, shards: list[list[dict[str, Any]]], groups: list[list[bytes]]
    ) -> Iterator[tuple[list[int], torch.Tensor, dict[int, str]]]:
        if not self.staged:
            for inputs in shards:
                yield _encode(self.model, inputs, self.batch_size, self.prompt)
            return
        from vlm2vec.encoding import with_prompt

        with ThreadPoolExecutor(self.workers) as pool:

            def submit(inputs):
                return [pool.submit(self._features, item) for item in with_prompt(self.model, inputs, self.prompt)]

            coming = submit(shards[0]) if shards else []
            for i in range(len(shards)):
                features = [future.result() for future in coming]
                coming = submit(shards[i + 1]) if i + 1 < len(shards) else []
                yield self._forward(features, groups[i])

    def _forward(self, features, groups):
        from vlm2vec.encoding import chunks

        failures = {i: f for i, f in enumerate(features) if isinstance(f, str)}
        good = [i for i in range(len(features)) if i not in failures]
        kind = self.model.device.type
        vision_features = self._towers({groups[i]: features[i] for i in reversed(good) if features[i].vision}, kind)
        vectors = torch.empty(len(good), self.model.embedding_dim)
        for rows in chunks([features[i].length for i in good], self.batch_size, kind):
            chunk, visuals = [features[good[r]] for r in rows], None
            if vision_features:
                visuals = [vision_features[groups[good[r]]] for r in rows if features[good[r]].vision]
                chunk, visuals = [replace(f, vision={}) for f in chunk], torch.cat(visuals) if visuals else None
            packed = self.model.pack(chunk).to(self.model.device)
            vectors[rows] = torch.nn.functional.normalize(self.model(packed, vision_features=visuals).float(), dim=-1).cpu()
        return good, vectors, failures

    def _towers(self, distinct, kind):
        """{group: vision features}, each picture once; {} for families whose tower is part of the model's forward."""
        from vlm2vec.encoding import chunks

        names, out = list(distinct), {}
        for rows in chunks([distinct[n].length for n in names], self.batch_size, kind):
            chunk = [distinct[names[r]] for r in rows]
            features = self.model.vision(self.model.pack(chunk).to(self.model.device))
            if features is None:
                return {}
            out.update(zip((names[r] for r in rows), features.split([len(f.visual_index) for f in chunk])))
        return out


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
    shards = [[key for key in shard if key not in store] for shard in plan_shards(items, shard_cost, hashes)[rank::world]]
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
        groups = [[visual_key(item, hashes) for item in shard] for shard in inputs]
        for keys, (good, vectors, failures) in zip(shards, encoder.run(inputs, groups)):
            for i, reason in failures.items():
                unreadable[keys[i]] = reason
            finite = torch.isfinite(vectors).all(dim=1)
            if not bool(finite.all()):
                worst = items[keys[good[int((~finite).nonzero()[0])]]]
                raise ValueError(f"{short_name(worst)}: {NOT_FINITE}")
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
