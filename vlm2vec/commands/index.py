"""`vlm2vec index DIR -o FILE`: the images of a folder, embedded once, for `vlm2vec search QUERY ... --index FILE`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from vlm2vec.checkpoint.words import said_as
from vlm2vec.commands import common
from vlm2vec.commands.search import QUICKSTART_MODEL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", help="folder of images, those in folders below it too")
    parser.add_argument("--output", "-o", required=True, help="index to write, a safetensors file")
    parser.add_argument("--model", default=QUICKSTART_MODEL, help=f"checkpoint folder or hub name (default {QUICKSTART_MODEL})")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read, and name them, instead of stopping")
    parser.add_argument("--batch-size", type=int, default=32)
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if not args.output.endswith(".safetensors"):
        raise ValueError(f"--output {args.output}: expected a name that ends in .safetensors")
    common.require_own_output(args.output, args.model)
    paths = common.images_below(args.images)
    if args.model == QUICKSTART_MODEL and not os.path.isdir(args.model):
        raise ValueError(f"no model named, and {QUICKSTART_MODEL} is not there; give --model")
    model = common.load_model(args.model, args)
    inputs, prompt = said_as(model, [Path(path) for path in paths], "document")
    keys = [os.path.relpath(path, args.images) for path in paths]
    embeddings, keys = common.encode_named(
        model, inputs, keys, skip_bad=args.skip_bad, what="image", prompt=prompt, batch_size=args.batch_size
    )
    source = os.path.abspath(args.model) if os.path.isdir(args.model) else args.model
    about = {"model": source, "as": "document", "prompt": "", "normalized": True, "images": os.path.abspath(args.images)}
    common.write_embeddings(args.output, embeddings, keys, about, common.model_told(model))
    print(f"{args.output}: {len(keys)} images; vlm2vec search QUERY ... --index {args.output}")
    return 0
