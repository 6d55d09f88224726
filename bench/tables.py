"""What the tables of this folder end in: a CSV file where one is asked for, the aims that were missed, and the exit code."""

from __future__ import annotations

import argparse
import csv
import os


def write_csv(path: str, rows: list[dict]) -> None:
    """All rows under the union of their columns, with the versions that made them; whole or not at all."""
    import torch
    import transformers

    made_by = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads(), "device": "cpu"}
    rows = [{**made_by, **row} for row in rows]
    with open(path + ".part", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path + ".part", path)


def conclude(rows: list[dict], missed: list[str], path: str | None) -> int:
    """Write the CSV, say which aims were missed, and give the exit code: 1 when there are any."""
    if path:
        write_csv(path, rows)
    print("\n" + ("\n".join(missed) if missed else "every aim is met"))
    return 1 if missed else 0


def parsed(name: str, meaning: str, add_arguments, argv) -> argparse.Namespace:
    """The command line of `python -m bench NAME`, with --csv."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=meaning.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--csv", help="write the rows to this file")
    return parser.parse_args(argv)


def quiet() -> None:
    """No load reports and progress bars of transformers: a child process prints one line of JSON."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
