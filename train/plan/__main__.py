"""`python -m train plan RECIPE [--gpu NAME] [--ranks N] [--best]` and `plan --all`, installed `vlm2vec train plan`."""

from __future__ import annotations

import argparse
import math
import sys

from ..command import COMMAND
from ..recipe.schema import load_recipe
from .best.every_recipe import lines, planned_names, table
from .best.report import report as best_report
from .best.search import find_best
from .gpus import GPUS, gpu_at_hand, parse_gpu
from .report import report
from .search import Planner, make_plan


def main(argv: list[str]) -> int:
    """Prints the plan; exit code 1 where the recipe is not predicted to fit, with `--best` or `--all` where nothing is."""
    known, overrides = _parser().parse_known_args(argv)
    _check(known)
    if known.recipe is not None and known.recipe.startswith("--"):  # `--all --key value`: no recipe is named
        known.recipe, overrides = None, [known.recipe, *overrides]
    gpu = gpu_at_hand() if known.gpu is None else parse_gpu(known.gpu)
    if known.all:
        names = planned_names() if known.recipe is None else [known.recipe]
        every = lines(names, gpu, known.ranks, best=known.best, efficiency=known.efficiency, overrides=overrides)
        return 0 if table(every, gpu, known.ranks, best=known.best, price=known.price, write=_write) else 1
    if known.recipe is None:
        raise ValueError("expected a recipe to plan, got none; name one of `--list`, or say --all for every one of the project's")
    recipe = load_recipe(known.recipe, overrides, ranks=known.ranks)
    if known.best:
        found = find_best(Planner(recipe, gpu, known.ranks, name=known.recipe, efficiency=known.efficiency))
        _write(best_report(found, known.recipe, price=known.price, overrides=overrides))
        return 0 if found.best is not None else 1
    plan = make_plan(recipe, gpu, known.ranks, name=known.recipe, efficiency=known.efficiency)
    _write(report(plan, [*overrides], price=known.price))
    return 0 if plan.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{COMMAND} plan",
        description="What a recipe will need and take, before it is paid for: memory, FLOPs, time and the largest chunk budget.",
        allow_abbrev=False,
        epilog="Any other --key value overrides a key of the recipe, as in a run. RECIPE goes first.",
    )
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--gpu", help=f"{', '.join(GPUS)}, a shorter name (4090, h100), or SIZE_GiB:TFLOPS:TBs; default the card at hand")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs of this kind, all of them")
    parser.add_argument("--best", action="store_true", help="look for the fastest chunks, kept graphs, checkpointing and sharding that fit")
    parser.add_argument("--all", action="store_true", help="every recipe of the project: which fit, in hours (and money)")
    parser.add_argument("--price", type=float, help="of one GPU for an hour, in any money")
    parser.add_argument(
        "--efficiency",
        type=float,
        help="share of the GPU's TFLOP/s that matrix products reach; default what is known of its large products",
    )
    return parser


def _check(known: argparse.Namespace) -> None:
    if known.ranks < 1 or not 0 < (1 if known.efficiency is None else known.efficiency) <= 1:
        raise ValueError(f"--ranks must be at least 1 and --efficiency in (0, 1], got {known.ranks} and {known.efficiency}")
    if known.price is not None and not 0 <= known.price < math.inf:
        raise ValueError(f"--price must be 0 or more, got {known.price}; say what one GPU costs an hour, such as 2.5")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
