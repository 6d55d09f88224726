"""`python -m train RECIPE [--key value ...]`, also under `torchrun`. Run again, it goes on where it stopped."""

from __future__ import annotations

import os
import sys


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data-loader workers are forked
    try:
        if argv[0] == "plan":
            from .plan.search import main as plan

            return plan(argv[1:])
        from .run import run

        return run(argv)
    except ModuleNotFoundError as error:
        print(f"train: {error.name} is not installed; pip install -e '.[train]'", file=sys.stderr)
        return 2
    except (ValueError, FloatingPointError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("train: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


_USAGE = """usage: python -m train RECIPE [--key value ...] [--fresh]
       torchrun --nproc-per-node 8 -m train RECIPE [--key value ...]
       python -m train plan RECIPE --gpu h100-80 [--ranks 8] [--key value ...]

RECIPE is a YAML file (train/recipes/); --key value overrides a key of it, nested ones with dots: --loss.temperature 0.05.
A run that was interrupted goes on from its last complete checkpoint; --fresh discards what the output folder holds.
`plan` predicts memory, FLOPs and time without reading a weight; `plan --help` lists the GPUs it knows."""


if __name__ == "__main__":
    sys.exit(main())
