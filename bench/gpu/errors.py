"""What the kernels' errors are known to be, option by option: bench/gpu/errors.json, of which the gate allows twice.

    python -m bench.gpu.errors [--new]          (on a CPU, kernels interpreted: ten minutes; --new: only of what nothing is known)

For every option, type, path and size of the gate: |ours - truth| / |truth| in float64, of the loss and of each gradient, the largest
over a few draws of the inputs. The truth starts from the inputs as rounded to the type. The interpreter rounds as a GPU does, but
sums in another order and has exact exponentials: UNITS of float32, which `allowed` adds.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

FILE = Path(__file__).parent / "errors.json"
SEEDS = {"temperature gradient": 4}  # the error of a single number can be small by luck; that of a matrix of them is the same every time
UNITS = 2  # of float32, 2^-23 each


@functools.cache
def known() -> dict[str, dict[str, float]]:
    return json.loads(FILE.read_text())


def key(case, path: str) -> str:
    return f"{case.name} | {case.type_name} | {path} | {case.n}x{case.m}x{case.d}"


def allowed(case, path: str) -> dict[str, float]:
    """Error allowed of the loss and of each gradient. Raises KeyError where nothing is known."""
    at = key(case, path)
    if at not in known():
        raise KeyError(f"no error is known of {at}; python -m bench.gpu.errors measures them")
    return {name: 2 * error + UNITS * 2**-23 for name, error in known()[at].items()}


def measured(case, path: str, device: str) -> dict[str, float] | None:
    """The largest errors over the seeds, None where the path does not take the case."""
    from bench.gpu.cases import errors_of

    worst: dict[str, float] = {}
    for seed in range(SEEDS.get(case.name, 1)):
        errors = errors_of(case, path, device, seed)
        if errors is None:
            return None
        worst = {name: max(error, worst.get(name, 0.0)) for name, error in errors.items()}
    return worst


def main(argv: list[str]) -> int:
    from bench import tables
    from bench.gpu import cases
    from contrastive_kernels.triton.kernels.common import INTERPRET

    if not INTERPRET:
        print("python -m bench.gpu.errors: set TRITON_INTERPRET=1; what a GPU does is for the gate to judge", file=sys.stderr)
        return 2
    table = dict(known()) if argv == ["--new"] else {}
    for case in [*cases.cases(cases.DRY_SHAPE, cases.DRY), *cases.cases()]:
        for path in case.paths:
            if key(case, path) in table:
                continue
            errors = measured(case, path, "cpu")
            if errors is not None:
                table[key(case, path)] = {name: float(f"{error:.2e}") for name, error in errors.items()}
                print(key(case, path), table[key(case, path)], flush=True)
    lines = ",\n".join(f"{json.dumps(at)}: {json.dumps(errors)}" for at, errors in table.items())
    tables.write_whole(FILE, "{\n" + lines + "\n}\n")
    print(f"{len(table)} written to {FILE}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, below
    sys.exit(main(sys.argv[1:]))
