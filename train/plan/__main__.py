"""`python -m train plan RECIPE --gpu NAME [--ranks N]`, installed `vlm2vec train plan`."""

from __future__ import annotations

import argparse
import sys

from ..command import COMMAND
from ..recipe.schema import load_recipe
from .gpus import GPUS, parse_gpu
from .report import report
from .search import make_plan


def main(argv: list[str]) -> int:
    """Prints the plan; exit code 1 where the recipe is not predicted to fit."""
    parser = argparse.ArgumentParser(
        prog=f"{COMMAND} plan",
        description="What a recipe will need and take, before it is paid for: memory, FLOPs, time and the largest chunk budget.",
        allow_abbrev=False,
        epilog="Any other --key value overrides a key of the recipe, as in a run. RECIPE goes first.",
    )
    parser.add_argument("recipe")
    parser.add_argument("--gpu", required=True, help=f"{', '.join(GPUS)}, or SIZE_GiB:TFLOPS:TBs")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs of this kind, all of them")
    parser.add_argument(
        "--efficiency",
        type=float,
        help="share of the GPU's TFLOP/s that matrix products reach; default what is known of its large products",
    )
    known, overrides = parser.parse_known_args(argv)
    if known.ranks < 1 or not 0 < (1 if known.efficiency is None else known.efficiency) <= 1:
        raise ValueError(f"--ranks must be at least 1 and --efficiency in (0, 1], got {known.ranks} and {known.efficiency}")
    plan = make_plan(
        load_recipe(known.recipe, overrides, ranks=known.ranks),
        parse_gpu(known.gpu),
        known.ranks,
        name=known.recipe,
        efficiency=known.efficiency,
    )
    sys.stdout.write(report(plan, [*overrides]))
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
