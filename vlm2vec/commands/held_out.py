"""`vlm2vec eval MODEL --data RECIPE.yaml`: the rows that a recipe keeps out of training, a task a source."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

from vlm2vec.commands.train import trainer
from vlm2vec.files.locks import locked


def is_recipe(data: str | None) -> bool:
    """Whether --data is a recipe and no folder of data sets."""
    return data is not None and data.endswith((".yaml", ".yml")) and not Path(data).is_dir()


def run(args: argparse.Namespace, evaluate: Callable) -> int:
    """Writes the rows as pairs into OUTPUT/held-out and scores them there.

    Args:
        args: of `vlm2vec eval`. evaluate: its `_evaluate(args, tasks, rank, world, barrier)`.

    Raises:
        ValueError: a recipe without held-out rows, or no source of the names asked for.
    """
    from vlm2vec.evaluation.encode.processes import finish, local_device, process_group
    from vlm2vec.evaluation.loaders.pairs import FILE, pair_tasks

    rank, world, barrier = process_group()
    args.device = args.device or local_device()
    folder = Path(args.output) / "held-out"
    with locked(args.output, "an evaluation") if rank == 0 else nullcontext():
        if rank == 0:
            for earlier in folder.glob(f"*/{FILE}"):
                earlier.unlink()
            import_module(f"{trainer()}.data.held_out_pairs").write_held_out(args.data, folder)
        if barrier is not None:
            barrier()
        tasks = pair_tasks(folder)
        chosen = [task for task in tasks if not args.tasks or task.name in args.tasks]
        if not chosen:
            there = ", ".join(task.name for task in tasks)
            raise ValueError(f"--tasks {' '.join(args.tasks)}: no such source in {args.data}; {there} hold rows back")
        args.data = str(folder)
        evaluate(args, chosen, rank, world, barrier)
    finish()
    return 0
