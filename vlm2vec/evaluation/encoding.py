"""From inputs to stored embeddings: what is missing is encoded, shard by shard, each distinct input once.

The plan is a pure function of the set of inputs: sorted by visuals, text length and key, cut into shards, shards dealt
to the processes in turn. Task order, the number of processes and earlier kills change neither batches nor vectors.
"""

import os
import sys

import torch

from vlm2vec.evaluation.keys import write_json

SHARD_COST = 4096  # a text costs 4, an image 32, a video frame 32: about 1,000 texts or 110 pictures in a shard


def visuals_of(item):
    """(images, video frames) of an input; a video file that is not split yet counts as 8 frames."""
    images, videos = item.get("image") or [], item.get("video") or []
    images = images if isinstance(images, (list, tuple)) else [images]
    frames = len(videos) if isinstance(videos, (list, tuple)) else 8
    return len(images), frames


def cost_of(item):
    """Rough cost of encoding, in the units of SHARD_COST."""
    images, frames = visuals_of(item)
    return 4 + len(item.get("text") or "") // 64 + 32 * (images + frames)


def plan_shards(items, shard_cost=SHARD_COST):
    """Lists of keys. `items` is {key: input}; the plan depends on the set alone, not on its order."""
    def order(key):
        images, frames = visuals_of(items[key])
        return (images + frames, len(items[key].get("text") or ""), key)

    shards, cost = [], 0
    for key in sorted(items, key=order):
        here = cost_of(items[key])
        if not shards or cost + here > shard_cost:
            shards.append([])
            cost = 0
        shards[-1].append(key)
        cost += here
    return shards


def _encode(model, inputs, **options):
    vectors = model.encode(inputs, convert_to_tensor=True, show_progress_bar=False, **options)
    return torch.as_tensor(vectors)


def encode_readable(model, inputs, **options):
    """Encode what can be decoded.

    Returns: (indices, vectors, failures): indices of the inputs that were encoded, their (n, D) vectors, and
    {index: reason} for the others. An error that no single input explains is raised as it came.
    """
    try:
        return list(range(len(inputs))), _encode(model, inputs, **options), {}
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
    vectors = _encode(model, [inputs[i] for i in good], **options) if good else torch.empty(0, 0)
    return good, vectors, failures


def fill_store(model, store, items, *, rank=0, world=1, batch_size=32, prompt=None, shard_cost=SHARD_COST, progress=True):
    """Encode this process's share of what the store lacks.

    Args:
        items: {key: input} over all tasks. rank, world: shard i belongs to process i % world.
        prompt: passed to encode; it must already be part of the keys.

    Returns: {key: reason} of inputs that cannot be decoded. Raises ValueError naming an input whose vector is not finite.
    """
    from tqdm import tqdm

    shards = plan_shards(items, shard_cost)[rank::world]
    missing = sum(key not in store for shard in shards for key in shard)
    bar = tqdm(total=missing, unit="input", desc="encode", file=sys.stderr, disable=not progress or rank != 0 or not missing)
    options = {"batch_size": batch_size, **({"prompt": prompt} if prompt is not None else {})}
    unreadable = {}
    for shard in shards:
        keys = [key for key in shard if key not in store]
        if not keys:
            continue
        good, vectors, failures = encode_readable(model, [items[key] for key in keys], **options)
        for i, reason in failures.items():
            unreadable[keys[i]] = reason
        if good:
            finite = torch.isfinite(vectors).all(dim=1)
            if not bool(finite.all()):
                worst = items[keys[good[int((~finite).nonzero()[0])]]]
                raise ValueError(f"the model returned a vector that is not finite for {describe(worst)}; check weights and dtype")
            store.add([keys[i] for i in good], vectors)
        bar.update(len(keys))
    bar.close()
    return unreadable


def describe(item):
    """A short name of an input for messages."""
    visual = item.get("image") or item.get("video") or ""
    visual = visual if isinstance(visual, (str, os.PathLike)) else type(visual).__name__
    text = (item.get("text") or "").replace("\n", " ")
    return " ".join(part for part in (str(visual), repr(text[:60]) if text else "") if part)


def share_unreadable(store, unreadable, rank):
    """Leave this process's failures where the others find them (plain JSON; nothing is unpickled)."""
    write_json(store.folder / f"unreadable-{rank}.json", {key.hex(): reason for key, reason in unreadable.items()})


def collect_unreadable(store, world):
    """{key: reason} over all processes."""
    import json

    found = {}
    for rank in range(world):
        path = store.folder / f"unreadable-{rank}.json"
        if path.exists():
            found.update({bytes.fromhex(k): v for k, v in json.loads(path.read_text(encoding="utf-8")).items()})
    return found
