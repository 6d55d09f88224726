"""python -m vlm2vec.quickstart build|report DIR"""

from __future__ import annotations

import argparse
import os
import sys
import time

from vlm2vec.commands.notices import keep_back


def main(arguments: list[str] | None = None) -> int:
    """Run one step of the quickstart. Returns the exit code: 0, or 2 for an error that one line on stderr explains."""
    parser = argparse.ArgumentParser(prog="python -m vlm2vec.quickstart", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    build = steps.add_parser("build", help="draw the benchmark and make the untrained model")
    build.add_argument("folder", help="folder to work in; made when it is not there")
    build.add_argument("--seed", type=int, default=0, help="fixes pictures, rows and weights (default 0)")
    build.add_argument("--workers", type=int, help="drawing processes (default: the number of cores)")
    build.add_argument("--teacher", action="store_true", help="also make teacher-init, a larger model to distil the small one from")
    report = steps.add_parser("report", help="write report.html and print the table of scores")
    report.add_argument("folder", help="folder of the quickstart, with scores-before and scores-after")
    given = parser.parse_args(arguments)
    keep_back()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads else spin while a busy machine runs others
    try:
        return _build(given) if given.step == "build" else _report(given)
    except ModuleNotFoundError as error:
        print(f"quickstart: {error.name} is not installed; make setup, or pip install -e '.[quickstart,eval]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quickstart: stopped; the same command goes on", file=sys.stderr)
        return 130


def _build(given) -> int:
    from vlm2vec.quickstart.build import build_data
    from vlm2vec.quickstart.tiny_model import build_model

    start = time.perf_counter()
    build_data(given.folder, given.seed, workers=given.workers)
    build_model(given.folder, given.seed)
    if given.teacher:
        build_model(given.folder, given.seed, teacher=True)
    print(f"built in {time.perf_counter() - start:.0f} s")
    return 0


def _report(given) -> int:
    from vlm2vec.quickstart.report import report

    report(given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
