"""Hard negatives: for each training row, targets of other rows that the model ranks high but that are not its answer.

Filters, in this order: identity (content equal to any positive of an equal query, or the same value in an id column), rank
window, margins against the row's own positive. Margins keep false negatives out (NV-Retriever's positive-aware mining,
arXiv:2407.15831: relative margin 0.95).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vlm2vec.evaluation.encode.keys import ContentHashes, item_key, model_identity
from vlm2vec.evaluation.encode.missing import fill_store
from vlm2vec.evaluation.encode.store import EmbeddingStore
from vlm2vec.files import AnyPath, write_json, write_table

MOST_EXCLUDED = 1024


@dataclass
class MineOptions:
    """negatives per row; window of 1-based ranks (after the identity filter); margins, None switches one off.

    margin: a negative scores at most positive - margin. relative: at most relative * positive (positive scores above 0).
    sampling: "top" takes the highest in the window, "random" draws from it by `seed`.
    """

    negatives: int = 1
    window: tuple = (1, 100)
    margin: float | None = None
    relative: float | None = 0.95
    sampling: str = "top"
    seed: int = 0
    id_column: str | None = None

    def __post_init__(self):
        first, last = self.window
        if not 1 <= first <= last:
            raise ValueError(f"--window takes two ranks, 1 <= FIRST <= LAST, got {first} and {last}")
        if self.negatives < 1:
            raise ValueError(f"--negatives is at least 1, got {self.negatives}")
        if self.sampling not in ("top", "random"):
            raise ValueError(f"--sampling is top or random, got {self.sampling!r}")
        if self.relative is not None and not 0 < self.relative <= 1:
            raise ValueError(f"--relative is above 0 and at most 1, got {self.relative}")


def exclusions(query_ids: Sequence[int], positive_ids: Sequence[int], extra_ids: Sequence[Hashable | None] | None = None) -> torch.Tensor:
    """(N, E) int64, -1 padded: for each row the targets that may not be its negatives.

    Args: query_ids, positive_ids: lists of ints (equal content, equal id). extra_ids: any hashable per row, or None; rows
        that share one are never negatives of each other.
    """
    by_query, by_extra = defaultdict(set), defaultdict(set)
    for i, (q, p) in enumerate(zip(query_ids, positive_ids)):
        by_query[q].add(p)
        if extra_ids is not None and extra_ids[i] is not None:
            by_extra[extra_ids[i]].add(p)
    rows = []
    for i, (q, p) in enumerate(zip(query_ids, positive_ids)):
        mine = set(by_query[q]) | {p}
        if extra_ids is not None and extra_ids[i] is not None:
            mine |= by_extra[extra_ids[i]]
        # the row's own positive always counts; a query with thousands of answers keeps the first of them
        rows.append([p] + sorted(mine - {p})[: MOST_EXCLUDED - 1])
    table = torch.full((len(rows), max(map(len, rows), default=1)), -1)
    for i, row in enumerate(rows):
        table[i, : len(row)] = torch.tensor(row)
    return table


def choose(scores: torch.Tensor, indices: torch.Tensor, positive_scores: torch.Tensor, options: MineOptions) -> tuple[list[list[int]], int]:
    """Pick negatives from ranked candidates.

    Args: scores, indices: (N, K) descending, -1 pads. positive_scores: (N,).
    Returns: (list of index lists, number of candidates that a margin turned down).
    """
    first, last = options.window
    scores, indices = scores[:, first - 1 : last], indices[:, first - 1 : last]
    ceiling = torch.full_like(positive_scores, float("inf"))
    if options.margin is not None:
        ceiling = torch.minimum(ceiling, positive_scores - options.margin)
    if options.relative is not None:
        # a positive at or below 0 has no meaningful share: then nothing may outrank the positive itself
        ceiling = torch.minimum(ceiling, torch.where(positive_scores > 0, options.relative * positive_scores, positive_scores))
    allowed = (indices >= 0) & (scores <= ceiling[:, None])
    dropped = int(((indices >= 0) & ~allowed).sum())
    generator = torch.Generator().manual_seed(options.seed)
    picks = []
    for row, mask in zip(indices, allowed):
        good = row[mask]
        if options.sampling == "random" and len(good) > options.negatives:
            good = good[torch.randperm(len(good), generator=generator)[: options.negatives].sort().values]
        picks.append(good[: options.negatives].tolist())
    return picks, dropped


def mine_dataset(
    model: Any,
    root: AnyPath,
    name: str,
    images: AnyPath,
    output: AnyPath,
    options: MineOptions,
    *,
    store: AnyPath,
    batch_size: int = 32,
    split: str = "original",
    progress: bool = True,
) -> dict[str, Any]:
    """Mine one data set and write OUTPUT/{name}/original-00000.parquet in the training layout.

    Args: root, images: training folder and image root. store: an embedding store folder.
    Returns: {"dataset", "rows", "pool", "mined", "rows_without", "unreadable", "dropped_by_margin", "positive_score",
        "negative_score"}, also written to OUTPUT/{name}/mined.json.
    """
    from contrastive_kernels import topk_similarity
    from vlm2vec.data.mmeb import read_train, to_item

    table = read_train(root, name, split=split)
    hashes = ContentHashes()

    def keyed(texts, paths):
        keys, items = [], {}
        for text, path in zip(texts, paths):
            item = to_item(text, path, images)
            try:
                keys.append(item_key(item, hashes))
                items.setdefault(keys[-1], item)
            except ValueError:
                keys.append(None)
        return keys, items

    query_keys, query_items = keyed(table["qry"], table["qry_image_path"])
    pos_keys, pos_items = keyed(table["pos_text"], table["pos_image_path"])
    vectors = EmbeddingStore(store, model_identity(model))
    with torch.inference_mode():
        fill_store(model, vectors, {**query_items, **pos_items}, batch_size=batch_size, progress=progress, hashes=hashes)
    usable = [i for i, (q, p) in enumerate(zip(query_keys, pos_keys)) if q in vectors and p in vectors]
    if not usable:
        raise ValueError(f"dataset {name}: no row has a readable query and positive; is the image folder right?")
    pool_of, source = {}, []
    for i in usable:
        if pos_keys[i] not in pool_of:
            pool_of[pos_keys[i]] = len(source)
            source.append(i)
    positives = [pool_of[pos_keys[i]] for i in usable]
    numbers = {}
    queries = [numbers.setdefault(query_keys[i], len(numbers)) for i in usable]
    extra = _column(root, name, split, options.id_column) if options.id_column else None
    exclude = exclusions(queries, positives, [extra[i] for i in usable] if extra else None)
    target = vectors.get(list(pool_of))
    query = vectors.get([query_keys[i] for i in usable])
    positive_scores = (query * target[torch.tensor(positives)]).sum(1)
    width = min(options.window[1], len(source))
    scores, indices = topk_similarity(query, target, width, exclude=exclude)
    picks, dropped = choose(scores.float(), indices, positive_scores, options)
    negatives = [[] for _ in range(len(table))]
    for i, pick in zip(usable, picks):
        negatives[i] = [source[c] for c in pick]
    _write(table, negatives, options.negatives, Path(output) / name / f"{split}-00000.parquet")
    count = sum(map(len, picks))
    chosen = [float(query[r] @ target[c]) for r, pick in enumerate(picks) for c in pick]
    facts = {
        "dataset": name,
        "rows": len(table),
        "pool": len(source),
        "mined": count,
        "rows_without": sum(not n for n in negatives),
        "unreadable": len(table) - len(usable),
        "dropped_by_margin": dropped,
        "positive_score": float(positive_scores.mean()),
        "negative_score": sum(chosen) / count if count else None,
        "options": asdict(options),
    }
    write_json(Path(output) / name / "mined.json", facts)
    return facts


def _column(root, name, split, column):
    """One column of the raw training files, for --id-column."""
    import pyarrow.parquet as pq

    files = sorted((Path(root) / name).glob(f"{split}-*.parquet"))
    values = []
    for file in files:
        names = pq.read_schema(file).names
        if column not in names:
            raise ValueError(f"{file}: no column {column!r} for --id-column; it has {', '.join(names)}")
        values += pq.read_table(file, columns=[column])[column].to_pylist()
    return values


def _write(table, negatives, count, path):
    """Rows with neg_text and neg_image_path: strings for one negative a row (MMEB's layout), lists for several."""
    import pyarrow as pa

    texts, paths = list(table["pos_text"]), list(table["pos_image_path"])
    columns = {c: list(table[c]) for c in ("qry", "qry_image_path", "pos_text", "pos_image_path")}
    if count == 1:
        columns["neg_text"] = [texts[n[0]] if n else "" for n in negatives]
        columns["neg_image_path"] = [paths[n[0]] if n else "" for n in negatives]
        kind = pa.string()
    else:
        columns["neg_text"] = [[texts[i] for i in n] for n in negatives]
        columns["neg_image_path"] = [[paths[i] for i in n] for n in negatives]
        kind = pa.list_(pa.string())
    schema = pa.schema([(c, kind if c.startswith("neg") else pa.string()) for c in columns])
    write_table(path, pa.table(columns, schema=schema))
