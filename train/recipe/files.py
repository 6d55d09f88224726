"""The recipes and mixtures that come with the project, found by their names wherever it is installed."""

from __future__ import annotations

import difflib
from pathlib import Path

from vlm2vec.files.documents import require_regular

from ..command import COMMAND

RECIPES = Path(__file__).parents[1] / "recipes"
MIXTURES = RECIPES / "mixtures"


def recipe_path(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a recipe of the project, with its ending or without.

    A file of the working folder comes before a recipe of that name.

    Raises:
        ValueError: neither; says the nearest name.
    """
    path = Path(name)
    if path.is_file():
        return path
    if str(name) and path.exists():
        require_regular(path)  # a folder or pipe, told as such
    known = recipe_names()
    if path.name == str(name) and path.name.removesuffix(".yaml") in known:
        return RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    near = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"recipe {name} is not a file, and none of the project's recipes; {hint}`{COMMAND} --list` lists them")


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def listing() -> str:
    """A line for each recipe: its name, and what its first comment says."""
    names = recipe_names()
    width = max(map(len, names))
    lines = []
    for name in names:
        first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        lines.append(f"{name:<{width}}  {first.lstrip('# ') if first.startswith('#') else ''}".rstrip())
    return "\n".join([*lines, "", f"They lie in {RECIPES}. A copy of one is a recipe of your own: {COMMAND} FILE."])
