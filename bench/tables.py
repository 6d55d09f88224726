"""What the tables of this folder end in: a CSV file where one is asked for, the aims that were missed, and the exit code."""

from __future__ import annotations

import argparse
import csv
import io
import os
import subprocess
from pathlib import Path

from bench.measure import ROOT, processor

SCRATCH = ROOT / "bench/scratch"  # where tables go by default; git ignores it
RESULTS = ROOT / "bench/results"  # what was measured on a card and is committed

# The one schema. A table has those columns that it fills, in this order, and its own behind them.
# part: which table; name: what a row measures, a peer or an option. Times are milliseconds of one call: ms_min the least of interleaved
# runs, ms_p20 to ms_p80 percentiles, cpu_ms processor time of all threads. ratio, cpu_ratio: over (or, where the name says "times as
# fast", under) what `ratio_to` or the name names. peak_mib: beyond what was there before; live_mib: live tensors of it, rss_mib: resident
# growth, process_mib: the whole process. times_three_gemms: milliseconds over those of the three bare products; share_of_limit: FLOP/s
# over the data sheet's; *_error: |got - truth| / |truth| in float64; value in `unit`, and what was predicted of it; aim and its verdict.
SCHEMA = (
    *("part", "name", "size", "dtype", "n", "m", "d", "temperature", "options", "repeat"),
    *("ms_min", "ms_p20", "ms_p50", "ms_p80", "cpu_ms", "ratio", "cpu_ratio", "ratio_to"),
    *("peak_mib", "live_mib", "rss_mib", "process_mib"),
    *("times_three_gemms", "tflops", "share_of_limit", "predicted_ms"),
    *("loss_error", "d_query_error", "d_target_error"),
    *("value", "unit", "predicted", "aim", "verdict", "note"),
    *("device", "threads", "torch", "triton", "transformers", "python", "commit"),
)


def versions(device: str | None = None) -> dict:
    """Columns that say what made a row. device: what it ran on, by default this machine's processor."""
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
        "device": processor() if device is None else device,
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def conclude(rows: list[dict], missed: list[str], path: str | None) -> int:
    """Write the CSV, say which aims were missed, and give the exit code: 1 when there are any."""
    if path:
        write_csv(path, rows)
    print("\n" + ("\n".join(missed) if missed else "every aim is met"))
    return 1 if missed else 0


def parser(name: str, meaning: str, csv_path: Path | None = None) -> argparse.ArgumentParser:
    """The command line of `python -m bench NAME`, with --csv.

    meaning: the table's docstring, whose first line is shown. csv_path: where rows go without --csv; None: nowhere.
    """
    made = argparse.ArgumentParser(prog=f"python -m bench {name}", description=meaning.splitlines()[0])
    made.add_argument("--csv", type=Path, default=csv_path, help="write the rows to this file" + (f" ({csv_path})" if csv_path else ""))
    return made
