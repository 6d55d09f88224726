"""`vlm2vec eval MODEL --data DIR --images DIR --output DIR`: MMEB, MMEB-V2, any folder in their layouts, or a recipe's held-out rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from vlm2vec.commands import common
from vlm2vec.files.documents import shown
from vlm2vec.files.locks import locked
from vlm2vec.media.images import REFERENCE

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
    parser.add_argument("--list", action="store_true", help="show the 78 published tasks with metric and published scores, and stop")
    parser.add_argument("--protocol", choices=("v1", "v2"), default="v1", help="candidate keys and files of MMEB (v1) or MMEB-V2 (v2)")
    parser.add_argument("--hub", action="store_true", help="read annotations that DATA lacks from the hub")
    parser.add_argument("--store", help="embedding store, shared between runs (default: OUTPUT/embeddings)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, help="threads that decode and preprocess (default: cores, at most 8)")
    parser.add_argument("--prompt", help="text put in front of every input (the data usually holds its own)")
    parser.add_argument("--top", type=int, default=100, help="candidates kept per query in the prediction files (default 100)")
    parser.add_argument("--strict", action="store_true", help="refuse a task with unreadable files or rows without an answer")
    parser.add_argument("--faiss", action="store_true", help="write the candidates of each task as a FAISS index (needs faiss-cpu)")
    parser.add_argument("--name", help="name of the model in reports (default: the last part of MODEL)")
    common.add_model_arguments(parser)
    parser.add_argument("--no-report", action="store_true", help="skip report.html")


def _need(args):
    for name in ("model", "output"):
        if not getattr(args, name):
            raise ValueError(f"vlm2vec eval needs {'a MODEL' if name == 'model' else '--' + name}; or --list to see the tasks")
    if not args.data and not args.hub:
        raise ValueError("vlm2vec eval needs --data DIR with one sub-folder per data set, or --hub")
    if args.top < 1 or args.batch_size < 1:
        raise ValueError(f"--top and --batch-size are at least 1, got {args.top} and {args.batch_size}")
    if args.top > MOST_SHOWN:
        raise ValueError(f"--top is at most {MOST_SHOWN:,}, got {shown(args.top)}")
    if args.workers is not None and not 1 <= args.workers <= MOST_WORKERS:
        raise ValueError(f"--workers is from 1 to {MOST_WORKERS} threads, got {shown(args.workers)}")


def _tasks(args):
    from vlm2vec.evaluation.tasks import find_tasks, load_tasks, read_task_file

    extra, names = {}, []
    for word in args.tasks:
        if word.endswith((".yaml", ".yml")):
            file_tasks = read_task_file(word)
            extra |= file_tasks
            names += list(file_tasks)
        else:
            names.append(word)
    if args.data:
        return find_tasks(args.data, names or None, extra) if not args.hub else _with_hub(args, names, extra)
    table = {**load_tasks(), **extra}
    return _chosen(table, names)


def _chosen(table, names):
    tasks = [t for t in table.values() if not names or any(n in (t.name, t.group, t.meta_task, t.modality) for n in names)]
    if not tasks:
        raise ValueError(f"no task, group or modality named {', '.join(names)}; see vlm2vec eval --list")
    return tasks


def _with_hub(args, names, extra):
    from vlm2vec.evaluation.tasks import find_tasks, load_tasks

    try:
        local = {t.name: t for t in find_tasks(args.data, None, extra)}
    except ValueError:
        local = {}
    return _chosen({**load_tasks(), **extra, **local}, names)


def run(args: argparse.Namespace) -> int:
    from vlm2vec.commands import held_out

    if held_out.is_recipe(args.data) and not args.list:
        _need(args)
        return held_out.run(args, _evaluate)
    from vlm2vec.evaluation.report.listing import list_tasks

    if args.list:
        print("\n".join(list_tasks()))
        return 0
    _need(args)
    tasks = _tasks(args)
    from vlm2vec.evaluation.encode.processes import finish, local_device, process_group
    from vlm2vec.evaluation.loaders import check_loader

    for task in tasks:
        check_loader(task)
    rank, world, barrier = process_group()
    args.device = args.device or local_device()
    with locked(args.output, "an evaluation") if rank == 0 else nullcontext():
        _evaluate(args, tasks, rank, world, barrier)
    finish()
    return 0


def _evaluate(args: argparse.Namespace, tasks: list, rank: int, world: int, barrier: Callable[[], None] | None) -> None:
    """Scores, and on the first process their summary and report."""
    from vlm2vec.evaluation.report.export import write_leaderboard
    from vlm2vec.evaluation.report.html import write_report
    from vlm2vec.evaluation.report.summary import terminal, write_summary
    from vlm2vec.evaluation.runner import Options, run_tasks
    from vlm2vec.evaluation.tasks import load_tasks

    model = common.load_model(args.model, args)
    options = Options(
        protocol=args.protocol,
        hub=args.hub,
        strict=args.strict,
        batch_size=args.batch_size,
        prompt=args.prompt,
        top=args.top,
        rank=rank,
        world=world,
        barrier=barrier,
        faiss=args.faiss,
        device=str(model.device),
        workers=args.workers,
        pictures={name: value for name, value in common.parse_options(args.option).items() if name in REFERENCE},
    )
    rows = run_tasks(model, tasks, args.data, args.media or args.data or ".", args.output, store=args.store, options=options)
    if rank == 0:
        name = args.name or Path(args.model).name or args.model
        summary = write_summary(args.output, rows, name, {"protocol": args.protocol}, options.broken_shards)
        print("\n".join(terminal(rows, summary["means"])))
        print(f"summary: {Path(args.output) / 'summary.md'}")
        if any(r["task"] in load_tasks() for r in rows):
            print(f"leaderboard file: {write_leaderboard(args.output, rows, name, embedding_dimension=model.embedding_dim)}")
        if not args.no_report:
            print(f"report: {write_report(args.output, rows, name)}")
