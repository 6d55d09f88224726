"""What the tables of this folder end in: a CSV file where one is asked for, the aims that were missed, and the exit code."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / "bench/scratch"  # where tables go by default; git ignores it
RESULTS = ROOT / "bench/results"  # what was measured on a card and is committed

# The schema of the house. A table has those columns that it fills, in this order, and its own behind them.
# ms: milliseconds of one call; peak_mib: beyond what was there before; times_three_gemms: milliseconds over those of the three bare
# products; share_of_limit: FLOP/s over the data sheet's; *_error: |got - truth| / |truth| in float64; value in `unit`, and what was
# predicted of it.
SCHEMA = (
    "part",
    "name",
    "dtype",
    "n",
    "m",
    "d",
    "temperature",
    "ms_p20",
    "ms_p50",
    "ms_p80",
    "peak_mib",
    "times_three_gemms",
    "tflops",
    "share_of_limit",
    "predicted_ms",
    "loss_error",
    "d_query_error",
    "d_target_error",
    "value",
    "unit",
    "predicted",
    "note",
    "device",
    "threads",
    "torch",
    "triton",
    "transformers",
    "python",
    "commit",
)


def versions(device: str = "cpu") -> dict:
    """Columns that say what made a row. device: what it ran on."""
    import platform
    from importlib import metadata

    import torch

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""

    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:  # no git
        commit = ""
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "commit": commit,
    }


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write a file whole or not at all."""
    part = f"{path}.part"
    with open(part, "w", newline="", encoding="utf-8") as file:
        file.write(text)
    os.replace(part, path)


def write_csv(path: str | os.PathLike, rows: list[dict], about: dict | None = None) -> None:
    """All rows under the union of their columns, SCHEMA's first, with the versions that made them; whole or not at all.

    about: columns of every row, `versions()` by default.
    """
    about = versions() if about is None else about
    rows = [{**about, **row} for row in rows]
    filled = dict.fromkeys(key for row in rows for key in row)
    columns = [name for name in SCHEMA if name in filled]
    columns += [name for name in filled if name not in columns]
    with open(f"{path}.part", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.part", path)


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
