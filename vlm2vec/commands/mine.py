"""`vlm2vec mine MODEL --data TRAIN --images DIR --output DIR`: training rows with hard negatives that the model found."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from vlm2vec.commands import common
from vlm2vec.files.locks import locked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder or hub name")
    parser.add_argument("--data", required=True, help="training folder, one sub-folder per data set (original-*.parquet)")
    parser.add_argument("--images", required=True, help="folder that image paths are relative to")
    parser.add_argument("--output", required=True, help="folder for the same data sets with neg_text and neg_image_path filled")
    parser.add_argument("--datasets", nargs="*", help="data sets to mine (default: all)")
    parser.add_argument("--split", default="original", help="files to read: original or diverse_instruction")
    parser.add_argument("--negatives", type=int, default=1, help="negatives per row (default 1; several are written as lists)")
    parser.add_argument(
        "--window",
        type=int,
        nargs=2,
        default=(1, 100),
        metavar=("FIRST", "LAST"),
        help="ranks to take them from, right answers not counted (default 1 100)",
    )
    parser.add_argument("--margin", type=float, help="a negative scores at most the positive's score minus this")
    parser.add_argument("--relative", type=float, default=0.95, help="... at most this share of the positive's (default 0.95)")
    parser.add_argument("--no-relative", action="store_true", help="switch the relative margin off")
    parser.add_argument("--sampling", choices=("top", "random"), default="top", help="the highest of the window, or a draw from it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--id-column", help="rows that share this column's value are never negatives of each other")
    parser.add_argument("--store", help="embedding store (default: OUTPUT/embeddings)")
    parser.add_argument("--batch-size", type=int, default=32)
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from vlm2vec.data.mmeb import dataset_names
    from vlm2vec.evaluation.mining import MineOptions, mine_dataset

    if args.batch_size < 1:
        raise ValueError(f"--batch-size is at least 1, got {args.batch_size}")
    options = MineOptions(
        args.negatives,
        tuple(args.window),
        args.margin,
        None if args.no_relative else args.relative,
        args.sampling,
        args.seed,
        args.id_column,
    )
    datasets = dataset_names(args.data, args.split)
    names = args.datasets or datasets
    missing = [n for n in names if n not in datasets]
    if missing or not names:
        raise ValueError(f"{args.data} holds no data set {', '.join(missing) or 'at all'}; it holds {', '.join(datasets) or 'nothing'}")
    if os.path.realpath(args.output) == os.path.realpath(args.data):
        raise ValueError(f"--output {args.output} is the folder of --data, whose files would be replaced; choose another one")
    with locked(args.output, "mining"):
        model = common.load_model(args.model, args)
        print(f"{'data set':<24} {'rows':>7} {'pool':>7} {'mined':>7} {'without':>7} {'pos.':>6} {'neg.':>6}")
        for name in names:
            facts = mine_dataset(
                model,
                args.data,
                name,
                args.images,
                args.output,
                options,
                store=args.store or Path(args.output) / "embeddings",
                batch_size=args.batch_size,
                split=args.split,
            )
            negative = "-" if facts["negative_score"] is None else f"{facts['negative_score']:.3f}"
            print(
                f"{name:<24} {facts['rows']:>7} {facts['pool']:>7} {facts['mined']:>7} {facts['rows_without']:>7} "
                f"{facts['positive_score']:>6.3f} {negative:>6}"
            )
    return 0
