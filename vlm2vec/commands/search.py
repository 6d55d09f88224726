"""`vlm2vec search [MODEL] QUERY ... --images DIR`: the images that fit each text (or image) best, with their scores."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm2vec.checkpoint.words import said_as
from vlm2vec.commands import common
from vlm2vec.data.index import identity
from vlm2vec.media.endings import FILMS, PICTURES

if TYPE_CHECKING:
    import torch

    from vlm2vec.model import VLM2Vec

QUICKSTART_MODEL = "quickstart/model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="+",
        metavar="[MODEL] QUERY",
        help="queries, texts or image files; in front of them a model (a folder or a hub name), "
        f"default the one that made the index, or {QUICKSTART_MODEL}",
    )
    parser.add_argument("--model", help="the model, instead of naming it in front of the queries")
    parser.add_argument("--images", help="folder of images to search")
    parser.add_argument("--index", help="instead of --images: what vlm2vec index wrote, a folder or a file")
    parser.add_argument(
        "--embeddings", help="instead of --images: what vlm2vec embed --as document wrote with the same model, a file or a folder of shards"
    )
    parser.add_argument("-k", type=int, default=5, help="how many to show for each query (default 5)")
    parser.add_argument(
        "--prompt", help="prompt of the queries: a name or the text itself (default: the model's for queries, else MMEB's words)"
    )
    parser.add_argument(
        "--image-prompt", help="prompt of the images: a name or the text itself (default: the model's for documents, else MMEB's words)"
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read, and name them, instead of stopping")
    parser.add_argument("--json", action="store_true", help="print a JSON list: of each query its best rank, score and key")
    parser.add_argument("--batch-size", type=int, default=32)
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    given = [name for name in ("images", "index", "embeddings") if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError("give --images DIR or --embeddings FILE or --index FILE, one of them")
    if args.k < 1:
        raise ValueError(f"-k must be at least 1, got {args.k}")
    in_index = args.index is not None and os.path.isdir(args.index)
    found = _in_index(args) if in_index else _in_memory(args)
    print(json.dumps(found, indent=2, ensure_ascii=True) if args.json else "\n".join(_table(found, "key" if in_index else "image")))
    return 0


def _in_index(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What an index, a folder, holds for each query."""
    from vlm2vec.data.index import Index

    index = Index.open(args.index)
    name, queries = model_and_queries(args, index.about.get("model"))
    model = common.load_model(name, args)
    index.require_model(model)
    vectors, _ = _vectors_of(model, queries, args)
    return [
        {"query": query, "results": [{"rank": rank, "score": hit.score, "key": hit.key} for rank, hit in enumerate(hits, 1)]}
        for query, hits in zip(queries, index.search_vectors(vectors, args.k))
    ]


def _in_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a folder of images, embedded now, or a file of embeddings holds for each query."""
    from contrastive_kernels import topk_similarity

    paths = common.images_below(args.images) if args.images is not None else None
    file = args.index or args.embeddings
    if args.embeddings is not None and os.path.isdir(args.embeddings):
        return _in_shards(args)
    stored = common.read_embeddings(file) if file else None
    name, queries = model_and_queries(args, (stored[2].get("model") if args.index else None) if stored else None)
    model = common.load_model(name, args)
    vectors, _ = _vectors_of(model, queries, args)
    if stored is not None:
        targets, keys = _from_file(file, stored, model, name, vectors)
    else:
        inputs, prompt = _asked(model, [Path(path) for path in paths], args.image_prompt, "document")
        keys = [os.path.relpath(path, args.images) for path in paths]
        targets, keys = common.encode_named(
            model, inputs, keys, skip_bad=args.skip_bad, what="image", prompt=prompt, batch_size=args.batch_size
        )
    scores, index = topk_similarity(vectors, targets.to(vectors.device), min(args.k, len(keys)))
    return [
        {"query": query, "results": [{"rank": rank, "score": score, "key": keys[i]} for rank, (score, i) in enumerate(zip(*row), 1)]}
        for query, row in zip(queries, zip(scores.tolist(), index.tolist()))
    ]


def _in_shards(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a folder of shards holds for each query."""
    from vlm2vec.data.bulk.shards import read_shards
    from vlm2vec.data.index.nearest import nearest

    shards, about = read_shards(args.embeddings)
    name, queries = model_and_queries(args, about["model"])
    model = common.load_model(name, args)
    compared = json.dumps(identity.compared(about["model_identity"]))
    common.require_same_model(args.embeddings, {"model": about["model"], "model_identity": compared}, model, name)
    vectors, _ = _vectors_of(model, queries, args)
    keys = [key for shard in shards for key in shard.keys]
    scores, places = nearest(vectors.cpu(), [shard.embeddings for shard in shards if shard.keys], args.k)
    return [
        {"query": query, "results": [{"rank": rank, "score": score, "key": keys[i]} for rank, (score, i) in enumerate(zip(*row), 1)]}
        for query, row in zip(queries, zip(scores.tolist(), places.tolist()))
    ]


def _vectors_of(model: VLM2Vec, queries: list[str], args: argparse.Namespace) -> tuple[torch.Tensor, list[str]]:
    """(vectors (Q, D), queries) as they are encoded."""
    asked, prompt = _asked(model, [_query(query) for query in queries], args.prompt, "query")
    return common.encode_named(model, asked, queries, what="query", prompt=prompt, batch_size=args.batch_size)


def model_and_queries(args: argparse.Namespace, of_index: str | None = None) -> tuple[str, list[str]]:
    """The model's name and the queries among the words of the command line.

    Args:
        of_index: the model that made the index, which is the default.
    """
    name, queries = _model_and_queries(args, of_index)
    if not all(query.strip() for query in queries):
        raise ValueError("a query is empty; say what to look for")
    return name, queries


def _model_and_queries(args: argparse.Namespace, of_index: str | None) -> tuple[str, list[str]]:
    words, default = list(args.words), of_index or (QUICKSTART_MODEL if os.path.isdir(QUICKSTART_MODEL) else None)
    if args.model:
        return args.model, words
    if len(words) > 1 and (_is_model(words[0]) or default is None):
        return words[0], words[1:]
    if default is None:
        raise ValueError(f"no model named, and {QUICKSTART_MODEL} is not there; say vlm2vec search MODEL {words[0]!r} --images DIR")
    return default, words


def _is_model(word: str) -> bool:
    """A folder, or what looks like a path or a hub name and is no file."""
    if os.path.isdir(word):
        return True
    looks = re.fullmatch(r"[\w.~-]*(/[\w.~-]+)+", word) is not None
    return looks and not os.path.isfile(word) and not word.lower().endswith(PICTURES + FILMS)


def _query(query: str) -> Any:
    """A query as an input: an image or film file where there is one of that name, else a text."""
    if os.path.isfile(query) and query.lower().endswith(PICTURES):
        return Path(query)
    return {"video": query} if os.path.isfile(query) and query.lower().endswith(FILMS) else query


def _asked(model: VLM2Vec, inputs: list, prompt: str | None, role: str) -> tuple[list, str | None]:
    """Inputs and prompt as they are encoded: the prompt asked for, or the words of this role."""
    return said_as(model, inputs, role) if prompt is None else (inputs, prompt)


def _from_file(file: str, stored: tuple, model: VLM2Vec, name: str, vectors: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """(embeddings, keys) of a file, which must be of the model that the queries are embedded with."""
    targets, keys, about = stored
    common.require_same_model(file, about, model, name)
    if targets.shape[1] != vectors.shape[1]:
        raise ValueError(f"{file} holds {targets.shape[1]} dimensions, the model makes {vectors.shape[1]}; embed with the same model")
    if about.get("as") != "document" and not about.get("prompt"):
        print(f"{file} was embedded without words around its inputs; embed --as document says those that search expects", file=sys.stderr)
    return targets, keys


def _table(found: list[dict[str, Any]], what: str) -> list[str]:
    lines = []
    for one in found:
        lines += [f"{one['query']}"] if len(found) > 1 else []
        lines.append(f"{'rank':>4}  {'score':>7}  {what}")
        lines += [f"{hit['rank']:>4}  {hit['score']:>7.4f}  {hit['key']}" for hit in one["results"]]
    return lines
