"""`vlm2vec data preview RECIPE`: training rows as the model will see them; the trainer's, which is installed as `vlm2vec.train`."""

from importlib import import_module

from vlm2vec.commands.train import trainer

_USAGE = """usage: vlm2vec data preview RECIPE [--rows N] [--every] [--decode] [--html FILE] [--key value ...]

vlm2vec data preview --help says more."""


def main(argv: list[str]) -> int:
    """Exit code of `vlm2vec data ...`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if argv[0] != "preview":
        raise ValueError(f"data {argv[0]!r}: expected preview; vlm2vec data preview RECIPE shows the rows of a recipe")
    return import_module(f"{trainer()}.reports.preview").main(argv[1:])
