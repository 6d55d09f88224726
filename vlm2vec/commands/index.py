"""`vlm2vec index DIR -o INDEX`: what a folder holds, embedded once and kept up to date, for `vlm2vec search QUERY ... --index INDEX`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from vlm2vec.checkpoint.words import said_as
from vlm2vec.commands import common
from vlm2vec.commands.search import QUICKSTART_MODEL
from vlm2vec.data.index.entries import KINDS

if TYPE_CHECKING:
    from vlm2vec.model import VLM2Vec

FILE = re.compile(r".*\.(npy|npz|json|jsonl|faiss|parquet|csv|tsv|pt|bin|h5)", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of images, films and texts (.txt, .md), those in folders below it too, or a .jsonl of rows")
    parser.add_argument(
        "--output",
        "-o",
        required=True,
        help="index to write, a folder; where it is there, it is updated. A name that ends in .safetensors: one file of images",
    )
    parser.add_argument("--model", help=f"checkpoint folder or hub name (default: the index's own, at first {QUICKSTART_MODEL})")
    parser.add_argument("--only", action="append", choices=list(KINDS), help="index these files of the folder alone; may be repeated")
    parser.add_argument("--skip-bad", action="store_true", help="leave out files that cannot be read, and name them, instead of stopping")
    parser.add_argument("--batch-size", type=int, default=32)
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.output.endswith(".safetensors"):
        return _one_file(args)
    if FILE.fullmatch(args.output) or os.path.isfile(args.output):
        raise ValueError(f"--output {args.output}: expected a folder to write the index into, or a name that ends in .safetensors")
    from vlm2vec.data.index import Index, is_index

    if os.path.isdir(args.output) and not is_index(args.output) and _is_used(args.output):
        raise ValueError(f"--output {args.output} is a folder that holds other files and no index; choose another name")

    def load(made: str) -> VLM2Vec:
        return common.load_model(args.model or made or _default(), args)

    index = Index(args.output, load=load)
    if not len(index) and args.model is None:
        _default()
    if len(index) and args.model is not None:
        index.require_model(load(""))
    done = index.update(args.folder, kinds=tuple(args.only) if args.only else None, skip_bad=args.skip_bad, batch_size=args.batch_size)
    if done.left_out:
        common.tell_left_out(done.left_out, len(index) + len(done.left_out), "file")
    print(f"{args.output}: {done}; {len(index)} in it; vlm2vec search QUERY ... --index {args.output}")
    return 0


def _is_used(folder: str) -> bool:
    """Whether there is anything that an update of an index did not leave."""
    return any(not name.startswith(("vectors-", "rows", ".lock")) for name in os.listdir(folder))


def _default() -> str:
    if not os.path.isdir(QUICKSTART_MODEL):
        raise ValueError(f"no model named, and {QUICKSTART_MODEL} is not there; give --model")
    return QUICKSTART_MODEL


def _one_file(args: argparse.Namespace) -> int:
    """The images of a folder in one file of embeddings, made anew each time."""
    if args.only and set(args.only) != {"image"}:
        raise ValueError(f"--only {' '.join(args.only)}: a .safetensors file holds images alone; name a folder behind --output")
    name = args.model or _default()
    common.require_own_output(args.output, name)
    paths = common.images_below(args.folder)
    model = common.load_model(name, args)
    inputs, prompt = said_as(model, [Path(path) for path in paths], "document")
    keys = [os.path.relpath(path, args.folder) for path in paths]
    embeddings, keys = common.encode_named(
        model, inputs, keys, skip_bad=args.skip_bad, what="image", prompt=prompt, batch_size=args.batch_size
    )
    source = os.path.abspath(name) if os.path.isdir(name) else name
    about = {"model": source, "as": "document", "prompt": "", "normalized": True, "images": os.path.abspath(args.folder)}
    common.write_embeddings(args.output, embeddings, keys, about, common.model_told(model))
    print(f"{args.output}: {len(keys)} images; vlm2vec search QUERY ... --index {args.output}")
    return 0
