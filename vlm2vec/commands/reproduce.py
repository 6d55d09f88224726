"""`vlm2vec eval --reproduce ROW` and `--check FILE`: settings out of a row, and a run beside it (docs/evaluation.md)."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm2vec.commands import common
from vlm2vec.files.documents import shown
from vlm2vec.media.sampling import FrameRule

if TYPE_CHECKING:
    from vlm2vec.evaluation.reproduce.rows import Row
    from vlm2vec.evaluation.runner import Options
    from vlm2vec.evaluation.tasks import Task


class Default(str):
    """A default of an option of the command line: what was given there is a plain text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reproduce",
        metavar="ROW",
        help="run with the settings of a published row (MODEL@SOURCE; a wrong name is answered with its likes) or of a score file, "
        "and compare; options given here win",
    )
    parser.add_argument("--check", metavar="FILE", help="say what differs here from what a score file was made with, and stop")


def apply_row(args: argparse.Namespace) -> Row | None:
    """The row of --reproduce, its settings in the place of options that were not given; None without it."""
    if not args.reproduce:
        return None
    from vlm2vec.evaluation.reproduce.rows import find_row

    row = find_row(args.reproduce)
    for name in ("protocol", "feeding"):
        if getattr(row, name) and isinstance(getattr(args, name, None), Default):
            setattr(args, name, getattr(row, name))
    args.frame_rule = None
    if args.frames is None and row.frames:
        args.frame_rule = FrameRule.parse(row.frames, whole_too=row.frames_everywhere)
    if args.prompt is None:
        args.prompt = row.prompt
    if args.dtype == "auto" and row.dtype:
        args.dtype = row.dtype
    args.row_options = row.options
    return row


def apply_checked(args: argparse.Namespace) -> None:
    """Protocol and feeding of the score file of --check where they were not given: by them its tasks are found."""
    if not args.check:
        return
    from vlm2vec.evaluation.reproduce.rows import read_scores

    row = read_scores(args.check)
    for name in ("protocol", "feeding"):
        if getattr(row, name) and isinstance(getattr(args, name, None), Default):
            setattr(args, name, getattr(row, name))


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Family options: the row's, and those of --option, which win."""
    return {**getattr(args, "row_options", {}), **common.parse_options(args.option)}


def frames_of(args: argparse.Namespace) -> FrameRule | None:
    """The rule of --frames, or of the row of --reproduce."""
    return getattr(args, "frame_rule", None) if args.frames is None else FrameRule.parse(args.frames)


def tasks_of(row: Row, tasks: list[Task]) -> list[Task]:
    """The tasks that the row has scores of, or means over. ValueError where it has none of them."""
    from vlm2vec.evaluation.reproduce.means import is_part

    shared = [task for task in tasks if task.name in row.scores or is_part(task, row.means)]
    if not shared:
        held = ", ".join([*row.scores, *row.means][:5])
        raise ValueError(f"row {row.name} has no score of {', '.join(task.name for task in tasks[:5])}; it has {held}, ...")
    return shared


def tell(row: Row, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """The comparison on the terminal and in the output folder."""
    from vlm2vec.evaluation.reproduce.means import mean_lines
    from vlm2vec.evaluation.reproduce.verdict import about, compare_with, lines, write_verdicts

    verdicts = compare_with(row, rows)
    done = {row["task"] for row in rows}
    missing = [name for name in row.scores if name not in done]
    print()
    if row.model and not _same_name(row.model, args.model):
        print(f"the row is of {row.model}, the model here is {args.model}")
    means = mean_lines(row, rows)
    print("\n".join([*lines(row, verdicts, missing=len(missing)), *means] if row.scores else [about(row), *means]))
    print(f"comparison: {write_verdicts(args.output, row, verdicts, missing, means)}")


def _same_name(theirs: str, ours: str) -> bool:
    """Whether two names of a model are alike: their last parts, without case and marks."""

    def bare(name: str) -> str:
        return "".join(c for c in Path(name).name.lower() if c.isalnum())

    return bare(theirs) in bare(ours) or bare(ours) in bare(theirs)


def check(args: argparse.Namespace, tasks: list[Task], options: Options) -> int:
    """Print what differs here from what the score file says; 1 where something does that may move a score, or a task of the file (of
    those of --tasks, where they are named) is not there to be compared, else 0."""
    from vlm2vec.evaluation.reproduce.causes import touches
    from vlm2vec.evaluation.reproduce.compare import HARMLESS, differences
    from vlm2vec.evaluation.reproduce.rows import read_scores

    row = read_scores(args.check)
    told = {name: score.run for name, score in row.scores.items() if score.run}
    if not told:
        print(f"{args.check}: {len(row.scores)} scores without settings (of an older release, or the reference's): nothing to compare")
        return 0
    mine = records_here(args, [task for task in tasks if task.name in told], options)
    moved = 0
    compared = {name: run for name, run in told.items() if name in mine}
    for name in told:
        if name not in mine and not (args.tasks and compared):
            print(f"{name}: not in {args.data or 'the tasks that were named'}", file=sys.stderr)
    for name, run in compared.items():
        found, modality = differences(run, mine[name]), mine[name]["task"]["modality"]
        counted = [d for d in found if d.kind not in HARMLESS and touches(d, modality)]
        moved += bool(counted)
        print(f"{name}: {'nothing differs' if not found else 'nothing that moves its score differs' if not counted else 'differs'}")
        for difference in found:
            print(f"  {difference.kind + ':':<11}{difference}{'' if difference in counted else ' (moves no score of this task)'}")
    absent = 0 if args.tasks and compared else len(told) - len(compared)
    if absent:
        print(f"{len(compared)} of {len(told)} tasks of {args.check} compared: {absent} are not among the tasks here")
    return int(bool(moved or absent))


def records_here(args: argparse.Namespace, tasks: list[Task], options: Options) -> dict[str, dict[str, Any]]:
    """{task: what a run with these arguments would say of itself}; nothing is encoded."""
    from vlm2vec.evaluation.encode.keys import ContentHashes, model_identity
    from vlm2vec.evaluation.reproduce.record import run_record
    from vlm2vec.evaluation.runner import read_tasks, readers

    model, media = options_model(args), args.media or args.data or "."
    options.device = str(model.device)
    hashes, records = ContentHashes(), {}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(args.output) / "media" if args.output else Path(folder)
        for reader, part in readers(model, tasks, options):
            identity = model_identity(reader)
            for prepared in read_tasks(part, args.data, media, cache, hashes, options):
                record = run_record(reader, identity, prepared, options, (args.data, media))
                records[prepared.data.task.name] = record
    return records


def options_model(args: argparse.Namespace) -> Any:
    """The model with the row's options below those that were given."""
    row_options = getattr(args, "row_options", {})
    if not row_options:
        return common.load_model(args.model, args)
    from vlm2vec import VLM2Vec

    loading = {name: getattr(args, name) for name in ("base", "dtype", "device", "attn")}
    try:
        model = VLM2Vec.from_pretrained(args.model, **loading, **options_of(args))
    except ValueError as error:
        if "unknown options" not in str(error):
            raise
        raise ValueError(f"row {args.reproduce} was made with {shown(row_options)}, which {args.model} does not take: {error}") from error
    return model.merge_adapter()
