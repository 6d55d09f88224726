"""`vlm2vec eval MODEL --data DIR --images DIR --output DIR`: MMEB, MMEB-V2, any folder in their layouts, or a recipe's held-out rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm2vec.commands import common, reproduce
from vlm2vec.files.documents import shown
from vlm2vec.files.locks import locked
from vlm2vec.media.images import REFERENCE

if TYPE_CHECKING:
    from vlm2vec.evaluation.runner import Options


MOST_SHOWN, MOST_WORKERS = 1_000_000, 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="checkpoint folder or hub name")
    parser.add_argument("--data", help="folder with one sub-folder per data set, or a recipe (.yaml), whose held-out rows are scored")
    parser.add_argument("--images", "--media", dest="media", help="folder that image and frame paths are relative to (default: DATA)")
    parser.add_argument("--output", help="folder for scores, predictions, summary and report")
    parser.add_argument(
        "--tasks",
        nargs="*",
        default=[],
        metavar="NAME|FILE.yaml",
        help="data sets, groups, meta-tasks or modalities to run, and YAML files with tasks of your own",
    )
    parser.add_argument(
        "--list", action="store_true", help="show the published tasks of the protocol (78, or V3's 190) with metric and scores, and stop"
    )
    parser.add_argument(
        "--protocol", choices=("v1", "v2", "v3"), default=reproduce.Default("v1"), help="MMEB (v1), MMEB-V2 (v2) or MMEB-V3 (v3)"
    )
    parser.add_argument(
        "--feeding",
        choices=("official", "wemm", "authors"),
        default=reproduce.Default("official"),
        help="which published evaluation to follow: words, pools, judgements (wemm needs --protocol v3, authors v2; docs/evaluation.md)",
    )
    parser.add_argument("--hub", action="store_true", help="read annotations that DATA lacks from the hub")
    parser.add_argument("--store", help="embedding store, shared between runs (default: OUTPUT/embeddings)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, help="threads that decode and preprocess (default: cores, at most 8)")
    parser.add_argument("--prompt", help="text put in front of every input (the data usually holds its own)")
    parser.add_argument("--top", type=int, default=100, help="candidates kept per query in the prediction files (default 100)")
    parser.add_argument(
        "--frames",
        metavar="N|fps:F,max:M",
        help="frames of every film (default: those of the protocol, or of the model's family; docs/evaluation.md)",
    )
    parser.add_argument("--strict", action="store_true", help="refuse a task with unreadable files or rows without an answer")
    parser.add_argument("--faiss", action="store_true", help="write the candidates of each task as a FAISS index (needs faiss-cpu)")
    parser.add_argument("--name", help="name of the model in reports (default: the last part of MODEL)")
    reproduce.add_arguments(parser)
    common.add_model_arguments(parser)
    parser.add_argument("--no-report", action="store_true", help="skip report.html")


def _need(args):
    for name in ("model",) if args.check else ("model", "output"):
        if not getattr(args, name):
            raise ValueError(f"vlm2vec eval needs {'a MODEL' if name == 'model' else '--' + name}; or --list to see the tasks")
    if not args.data and not args.hub:
        raise ValueError("vlm2vec eval needs --data DIR with one sub-folder per data set, or --hub")
    of = {"wemm": ("MMEB-V3", "v3"), "authors": ("MMEB-V2", "v2")}.get(str(args.feeding))
    if of and args.protocol != of[1]:
        raise ValueError(f"--feeding {args.feeding} is an evaluation of {of[0]}; add --protocol {of[1]}")
    if args.top < 1 or args.batch_size < 1:
        raise ValueError(f"--top and --batch-size are at least 1, got {args.top} and {args.batch_size}")
    if args.top > MOST_SHOWN:
        raise ValueError(f"--top is at most {MOST_SHOWN:,}, got {shown(args.top)}")
    if args.workers is not None and not 1 <= args.workers <= MOST_WORKERS:
        raise ValueError(f"--workers is from 1 to {MOST_WORKERS} threads, got {shown(args.workers)}")


def _tell_found(tasks: list, data: str) -> None:
    """How many of MMEB-V3's tasks are there: a folder with another name is no task, and no error."""
    from vlm2vec.evaluation.tasks import load_tasks

    found, wanted = {task.name for task in tasks}, load_tasks("v3")
    lacking = [name for name in wanted if name not in found]
    if lacking:
        told = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        print(f"{len(wanted) - len(lacking)} of {len(wanted)} tasks of MMEB-V3 are in {data}; not there: {told}", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    from vlm2vec.commands import held_out

    if held_out.is_recipe(args.data) and not args.list:
        _need(args)
        return held_out.run(args, _evaluate)
    from vlm2vec.evaluation.report.listing import list_tasks
    from vlm2vec.evaluation.tasks.choose import chosen_tasks

    if args.list:
        print("\n".join(list_tasks(str(args.protocol))))
        return 0
    row = reproduce.apply_row(args)
    reproduce.apply_checked(args)
    _need(args)
    tasks = chosen_tasks(args.tasks, args.data, hub=args.hub, protocol=str(args.protocol))
    if str(args.protocol) == "v3" and not (args.tasks or args.hub):
        _tell_found(tasks, args.data)
    if args.check:
        return reproduce.check(args, tasks, _options(args))
    if row is not None:
        tasks = reproduce.tasks_of(row, tasks)
    from vlm2vec.evaluation.encode.processes import finish, local_device, process_group
    from vlm2vec.evaluation.loaders import check_loader

    for task in tasks:
        check_loader(task)
    rank, world, barrier = process_group()
    args.device = args.device or local_device()
    with locked(args.output, "an evaluation") if rank == 0 else nullcontext():
        rows = _evaluate(args, tasks, rank, world, barrier)
        if row is not None and rank == 0:
            reproduce.tell(row, rows, args)
    finish()
    return 0


def _options(args: argparse.Namespace, **more: Any) -> Options:
    """The run's options, as the command line has them."""
    from vlm2vec.evaluation.runner import Options

    return Options(
        protocol=str(args.protocol),
        feeding=str(args.feeding),
        hub=args.hub,
        strict=args.strict,
        batch_size=args.batch_size,
        prompt=args.prompt,
        top=args.top,
        faiss=args.faiss,
        workers=args.workers,
        frames=reproduce.frames_of(args),
        pictures={name: value for name, value in reproduce.options_of(args).items() if name in REFERENCE},
        **more,
    )


def _evaluate(args: argparse.Namespace, tasks: list, rank: int, world: int, barrier: Callable[[], None] | None) -> list[dict[str, Any]]:
    """Scores, and on the first process their summary and report."""
    from vlm2vec.evaluation.report.export import write_leaderboard
    from vlm2vec.evaluation.report.html import write_report
    from vlm2vec.evaluation.report.summary import terminal, write_summary
    from vlm2vec.evaluation.runner import run_tasks
    from vlm2vec.evaluation.score.details import v3_facts
    from vlm2vec.evaluation.support import with_unsupported
    from vlm2vec.evaluation.tasks import load_tasks

    model = reproduce.options_model(args)
    tasks = tasks if args.tasks or args.reproduce else with_unsupported(model, tasks, str(args.protocol))
    options = _options(args, rank=rank, world=world, barrier=barrier, device=str(model.device))
    rows = run_tasks(model, tasks, args.data, args.media or args.data or ".", args.output, store=args.store, options=options)
    if rank == 0:
        name = args.name or Path(args.model).name or args.model
        summary = write_summary(args.output, rows, name, {"protocol": str(args.protocol), **v3_facts(options)}, options.broken_shards)
        print("\n".join(terminal(rows, summary["means"])))
        print(f"summary: {Path(args.output) / 'summary.md'}")
        if any(r["task"] in load_tasks(str(args.protocol)) for r in rows):
            print(f"leaderboard file: {write_leaderboard(args.output, rows, name, embedding_dimension=model.embedding_dim)}")
        if not args.no_report:
            print(f"report: {write_report(args.output, rows, name)}")
    return rows
