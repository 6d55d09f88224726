"""The version of the kernels' own wheel: the project's, from its one home; in a source archive of the kernels alone, the archive's."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def version() -> str:
    """What `vlm2vec/checkpoint/release.py` says, or the file that setuptools writes into a source archive."""
    home, archived = HERE.parent / "vlm2vec/checkpoint/release.py", HERE / "PKG-INFO"
    pattern, path = (r'^__version__ = "(.+)"$', home) if home.is_file() else (r"^Version: (.+)$", archived)
    return re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)[1]


setup(version=version())
