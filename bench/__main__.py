"""python -m bench NAME [options]: one table each. `python -m bench --help` lists them, `python -m bench NAME --help` explains one.

Runs from a bare checkout: this tree's own packages are measured, whatever else is installed.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLES = {
    "loss": "time and memory of the loss with its gradients, and of top-k search, next to others and to the bare products",
    "accuracy": "errors of loss and gradients against float64, ours and others', over dtypes, temperatures and crowding",
    "aot": "kernels compiled for GPUs that are not there: registers, spills, hot loops, predicted times",
    "gpu": "eight minutes on a machine with CUDA: is everything right there, how fast, and what do predictions miss",
    "encode": "embedding mixed texts and images: packed, next to padded ways and sentence-transformers",
    "eval": "an evaluation from disk to score files, and ranking alone, next to the reference's way",
    "wide": "memory of an evaluation of wide pools and long texts, next to holding all inputs",
    "serve": "the server under load next to encode of the same inputs, and the index of 100,000 vectors",
    "step": "one GradCache training step next to other ways to the same gradients",
    "plan": "the planned peak of memory next to runs: bytes of live tensors, and resident memory",
}


def use_this_checkout() -> None:
    """Put this tree's packages before all others, here and in children."""
    places = [str(ROOT / "kernels"), str(ROOT)]
    sys.path[:] = places + [place for place in sys.path if place not in places]
    others = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place and place not in places]
    os.environ["PYTHONPATH"] = os.pathsep.join(places + others)


def usage() -> str:
    listed = "\n".join(f"  {name:<10}{meaning}" for name, meaning in TABLES.items())
    return f"usage: python -m bench NAME [options]\n\n{listed}\n\npython -m bench NAME --help says more."


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in TABLES:
        print(f"python -m bench: no table {name!r}; there are {', '.join(TABLES)}", file=sys.stderr)
        return 2
    use_this_checkout()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads else spin while a busy machine runs others
    module = f"bench.{name}.run" if (ROOT / "bench" / name / "run.py").exists() else f"bench.{name}"
    return importlib.import_module(module).main(rest)


if __name__ == "__main__":
    sys.exit(main())
