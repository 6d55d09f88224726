"""`vlm2vec COMMAND`: embed, index, search, serve, eval, mine, data, train, plan, merge, info. Expected errors are one line, exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import NoReturn

from vlm2vec.commands.notices import keep_back

COMMANDS = {
    "embed": "embeddings of files or of a JSONL, written to a safetensors file",
    "index": "the images, films and texts of a folder, embedded once and kept up to date, for search",
    "search": "the images of a folder, an index or a file of embeddings that fit texts or images best",
    "serve": "embeddings over HTTP as OpenAI's clients ask for them, and a page to search an index",
    "eval": "MMEB, MMEB-V2 or data of your own in their layouts: scores, predictions, report",
    "mine": "hard negatives for training data",
    "data": "preview the rows of a recipe as the model will see them, and what of them cannot be read",
    "train": "train a model by a recipe, plan what it will need, list the recipes",
    "plan": "what training by a recipe will need and take; --best looks for the fastest settings that fit a card",
    "merge": "several checkpoints of one base made into one, adapters or full",
    "info": "what a model is: family, parameters by part, options, prompts, adapter, memory",
}

EXTRAS = {"serve": "serve"}  # what a command needs besides models


class Parser(argparse.ArgumentParser):
    """argparse, but a misused command is an expected error like any other: one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help says more")


def main(argv: list[str] | None = None) -> int:
    """Entry point. Only the chosen command's module is imported."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
        print("usage: vlm2vec COMMAND ...\n\n" + "\n".join(lines) + "\n\nvlm2vec COMMAND --help says more.")
        return 0 if argv else 2
    if argv[0] == "--version":
        from vlm2vec.checkpoint.release import __version__

        print(__version__)
        return 0
    name = argv[0]
    if name not in COMMANDS:
        print(f"vlm2vec: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    keep_back()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads else spin while a busy machine runs others
    try:
        command = import_module(f"vlm2vec.commands.{name}")
        if hasattr(command, "main"):  # it reads its words itself
            return command.main(argv[1:])
        parser = Parser(prog=f"vlm2vec {name}", description=COMMANDS[name])
        command.add_arguments(parser)
        return command.run(parser.parse_args(argv[1:])) or 0
    except ValueError as e:
        print(f"vlm2vec {name}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except OSError as e:  # a folder that cannot be made, a full disk, a file without permission
        if e.strerror is None:
            raise
        from vlm2vec.files import disk_message

        print(f"vlm2vec {name}: {disk_message(e)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("vlm2vec"):
            raise
        print(f"vlm2vec {name}: needs {e.name}; pip install 'vlm2vec[{EXTRAS.get(name, 'train')}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vlm2vec {name}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
