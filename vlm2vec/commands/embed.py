"""`vlm2vec embed MODEL INPUT ... --output FILE`: images, videos, folders of images, texts or a JSONL to embeddings."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm2vec.checkpoint.words import ROLES, said_as
from vlm2vec.commands import common
from vlm2vec.data.bulk.embedding import embed_shards, settle
from vlm2vec.data.bulk.inputs import stream
from vlm2vec.data.bulk.shards import FORMATS
from vlm2vec.data.index import identity
from vlm2vec.encoding import encode_stream
from vlm2vec.evaluation.encode.processes import local_device
from vlm2vec.files.locks import locked
from vlm2vec.media.endings import FILMS

if TYPE_CHECKING:
    import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder or hub name")
    parser.add_argument(
        "inputs",
        nargs="*",
        help="image or video files, folders of images, .jsonl files (rows with text, image, video, key), with --shards .parquet too",
    )
    parser.add_argument("--text", action="append", default=[], help="a text to embed; may be repeated")
    parser.add_argument("--output", "-o", help="safetensors file to write")
    parser.add_argument(
        "--shards", metavar="DIR", help="instead of --output: a folder of many files, for inputs by the million; goes on where it stopped"
    )
    parser.add_argument("--shard-rows", type=int, default=8192, help="inputs of one of these files (default 8192)")
    parser.add_argument("--format", choices=FORMATS, default="safetensors", help="of these files (default safetensors)")
    parser.add_argument("--images", help="folder that relative paths in a JSONL are taken from (default: the JSONL's own)")
    parser.add_argument(
        "--as",
        dest="role",
        choices=ROLES,
        help="say the words that search says around a query, or around a document to be found (default: the inputs bare)",
    )
    parser.add_argument("--prompt", default=None, help="text put in front of every input's text, or a prompt's name (query, document)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be read, and name them, instead of stopping")
    parser.add_argument("--urls", action="store_true", help="read pictures that rows name by http(s) URLs")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--truncate-dim", type=int, default=None, help="keep the first dimensions (Matryoshka models)")
    common.add_model_arguments(parser)


def collect(args: argparse.Namespace) -> tuple[list[str], list]:
    """Keys (path, JSONL key or the text itself) and inputs."""
    keys, inputs = [], []
    for path in args.inputs:
        if path.lower().endswith(".jsonl"):
            more_keys, more = common.read_jsonl(path, args.images)
            keys += more_keys
            inputs += more
        elif os.path.isdir(path):
            pictures = common.images_below(path)
            keys += pictures
            inputs += [Path(p) for p in pictures]
        elif not os.path.isfile(path):
            raise ValueError(f"{path}: no such file or folder; a text goes behind --text")
        else:
            keys.append(path)
            inputs.append({"video": path} if path.lower().endswith(FILMS) else Path(path))
    keys += args.text
    inputs += args.text
    if not inputs:
        raise ValueError("nothing to embed: name files, folders or a .jsonl, or give --text")
    return keys, inputs


def run(args: argparse.Namespace) -> int:
    if (args.output is None) == (args.shards is None):
        raise ValueError("--shards DIR, or else --output FILE, one of them, is required: --output/-o; vlm2vec embed --help says more")
    if args.shards is not None:
        return _shards(args)
    if not args.output.endswith(".safetensors"):
        raise ValueError(f"--output {args.output}: expected a name that ends in .safetensors")
    if args.role and args.prompt is not None:
        raise ValueError("--as says the words itself; give --as or --prompt, one of them")
    common.require_own_output(args.output, args.model)
    keys, inputs = collect(args)
    model = common.load_model(args.model, args)
    prompt = args.prompt
    if args.role:
        inputs, prompt = said_as(model, inputs, args.role)
    embeddings, keys = common.encode_named(
        model,
        inputs,
        keys,
        skip_bad=args.skip_bad,
        prompt=prompt,
        batch_size=args.batch_size,
        truncate_dim=args.truncate_dim,
        urls=args.urls,
    )
    about = {"model": args.model, "prompt": args.prompt or "", "as": args.role or "", "normalized": True}
    common.write_embeddings(args.output, embeddings, keys, about, common.model_told(model))
    print(f"{args.output}: {embeddings.shape[0]} embeddings of {embeddings.shape[1]} dimensions")
    return 0


def _shards(args: argparse.Namespace) -> int:
    """Inputs as they come into a folder of shards; under torchrun this rank's part of them."""
    if args.shard_rows < 1:
        raise ValueError(f"--shard-rows {args.shard_rows}: expected at least 1")
    if args.role and args.prompt is not None:
        raise ValueError("--as says the words itself; give --as or --prompt, one of them")
    if not args.inputs and not args.text:
        raise ValueError("nothing to embed: name files, folders, a .jsonl or a .parquet, or give --text")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if args.device is None:
        args.device = local_device()
    folder = Path(args.shards)
    with locked(folder, "an embedding of shards") if rank == 0 else contextlib.nullcontext():
        model = common.load_model(args.model, args)
        told = identity.whole(model)
        said = {"as": args.role or "", "prompt": args.prompt or "", "truncate_dim": args.truncate_dim, "shard_rows": args.shard_rows}
        settle(folder, {**said, "format": args.format, "model": args.model, "model_identity": told})
        compared = json.dumps(identity.compared(told), sort_keys=True)
        about = {"model": args.model, "prompt": args.prompt or "", "as": args.role or "", "normalized": "True", "model_identity": compared}

        def encode(inputs: Iterable[Any]) -> Iterator[tuple[torch.Tensor, dict[int, str]]]:
            prompt = args.prompt
            if args.role and model.prompts.get(args.role):
                prompt = model.prompts[args.role]
            elif args.role:
                inputs = (said_as(model, [x], args.role)[0][0] for x in inputs)
            options = {"prompt": prompt, "batch_size": args.batch_size, "truncate_dim": args.truncate_dim, "urls": args.urls}
            return encode_stream(model, inputs, skip_bad=args.skip_bad, **options)

        done = embed_shards(
            lambda: stream(args.inputs, args.text, args.images),
            folder,
            encode,
            rows=args.shard_rows,
            kind=args.format,
            about=about,
            rank=rank,
            world=world,
        )
    if done.left_out:
        common.tell_left_out(done.left_out, done.made + done.bad, "input")
    who = f"rank {rank} of {world}: " if world > 1 else ""
    print(f"{args.shards}: {who}{done.made} embedded, {done.kept} were there, of {done.rows} inputs in all")
    return 0
