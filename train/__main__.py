"""`python -m train RECIPE [--key value ...]`, installed `vlm2vec train RECIPE`, also under `torchrun`. Run again, it goes on."""

from __future__ import annotations

import os
import sys

from vlm2vec.commands.notices import keep_back

from .command import COMMAND, EXTRA, TORCHRUN


def main(argv: list[str] | None = None) -> int:
    """Exit code of a run, a plan or a list, with these words behind the command."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data-loader workers are forked
    keep_back()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads else spin while a busy machine runs others
    try:
        if argv[0] == "--list":
            from .recipe.files import listing

            print(listing())
            return 0
        if argv[0] == "plan":
            from .plan.__main__ import main as plan

            return plan(argv[1:])
        if argv[0] == "preview":
            from .reports.preview import main as preview

            return preview(argv[1:])
        if argv[0] == "teach":
            from .data.teachers import main as teach

            return teach(argv[1:])
        from .run import run

        return run(argv)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("train", "vlm2vec", "contrastive_kernels"):
            raise
        print(f"train: {error.name} is not installed; pip install {EXTRA}", file=sys.stderr)
        return 2
    except (ValueError, FloatingPointError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except OSError as error:  # a full disk, a folder without permission
        if error.strerror is None or error.filename is None:
            raise
        from vlm2vec.files import disk_message

        print(f"train: {disk_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


_USAGE = f"""usage: {COMMAND} RECIPE [--key value ...] [--fresh] [--profile STEP]
       torchrun --nproc-per-node 8 {TORCHRUN} RECIPE [--key value ...]
       {COMMAND} plan RECIPE --gpu h100-80 [--ranks 8] [--key value ...]
       {COMMAND} teach RECIPE --teacher MODEL -o FOLDER
       {COMMAND} --list
       {COMMAND} preview RECIPE [--rows N] [--html FILE]

RECIPE is a YAML file, or the name of one of the project's recipes, which --list lists; --key value overrides a key of it,
nested ones with dots: --loss.temperature 0.05.
A run that was interrupted goes on from its last complete checkpoint; --fresh discards what the output folder holds.
`preview` shows rows as the model will see them, and counts what cannot be read (also `vlm2vec data preview`).
--profile STEP writes a trace of that step into the output folder, for https://ui.perfetto.dev: its operators and kernels, with
waiting for data, first pass, loss, second pass, synchronisation and optimizer as named ranges. One file a rank.
`plan` predicts memory, FLOPs and time without reading a weight; `plan --help` lists the GPUs it knows.
`teach` embeds the rows with another model, whose vectors the loss `distillation` reads."""


if __name__ == "__main__":
    sys.exit(main())
