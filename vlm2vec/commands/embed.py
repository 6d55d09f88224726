"""`vlm2vec embed MODEL INPUT ... --output FILE`: images, videos, folders of images, texts or a JSONL to embeddings."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from vlm2vec.checkpoint.words import ROLES, said_as
from vlm2vec.commands import common
from vlm2vec.media.endings import FILMS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder or hub name")
    parser.add_argument(
        "inputs", nargs="*", help="image or video files, folders of images, or .jsonl files (rows with text, image, video, key)"
    )
    parser.add_argument("--text", action="append", default=[], help="a text to embed; may be repeated")
    parser.add_argument("--output", "-o", required=True, help="safetensors file to write")
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
