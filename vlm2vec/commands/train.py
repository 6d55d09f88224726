"""`vlm2vec train RECIPE [--key value ...]`: the trainer, which is installed as `vlm2vec.train`."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


def main(argv: list[str]) -> int:
    """Exit code of the trainer's own command line."""
    return import_module(f"{trainer()}.__main__").main(argv)


def trainer() -> str:
    """The trainer's package: `vlm2vec.train`; in a checkout that was not installed itself the folder `train` beside this package."""
    checkout, installed = Path(__file__).parents[2], find_spec("vlm2vec.train")
    is_checkout = (checkout / "train" / "recipes").is_dir()
    if installed is not None and (not is_checkout or Path(installed.origin or "").parent == checkout / "train"):
        return "vlm2vec.train"
    if not is_checkout:
        raise ValueError("the trainer is not part of this installation; pip install 'vlm2vec[train]' again")
    sys.path.insert(0, str(checkout))
    return "train"
