"""`vlm2vec merge A B ... -o DIR`: several checkpoints of one base made into one."""

from __future__ import annotations

import argparse

from vlm2vec.checkpoint.merging import DENSITY, METHODS, merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", help="folders or hub names: all full checkpoints, or all adapters")
    parser.add_argument("--output", "-o", required=True, help="new folder of the merged model")
    parser.add_argument("--weights", nargs="+", type=float, help="one a model, brought to a sum of 1 (default: equal ones)")
    parser.add_argument("--method", choices=METHODS, default="linear", help="linear: the mean; ties: trim, elect signs, mean of those")
    parser.add_argument("--base", help="what full checkpoints started from, for ties; of adapters, when their configs name another")
    parser.add_argument("--density", type=float, default=DENSITY, help="ties: share of each model's changes that is kept (default 0.2)")
    parser.add_argument("--scale", type=float, default=1.0, help="ties: what the merged changes are times (default 1)")


def run(args: argparse.Namespace) -> int:
    from vlm2vec.model import VLM2Vec

    options = {"weights": args.weights, "method": args.method, "base": args.base, "density": args.density, "scale": args.scale}
    print(merge(args.models, args.output, VLM2Vec.from_pretrained, **options))
    return 0
