"""What holds for the package as a whole: types on what people call, one number for the release."""

import ast
import tomllib
from importlib import import_module

import pytest

import vlm2vec
from tests.helpers.repository import ROOT

PACKAGES = ("vlm2vec",)
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def untyped(tree: ast.Module) -> list[str]:
    """Public functions, and methods of public classes, with an argument or a result that bears no type."""
    found = []

    def look(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                look(child, f"{child.name}.")
            elif isinstance(child, ast.FunctionDef) and (not child.name.startswith("_") or child.name in ("__init__", "__call__")):
                arguments = child.args
                named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
                bare = [a.arg for a in named if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
                if bare or (child.returns is None and child.name != "__init__"):
                    found.append(f"{prefix}{child.name}({', '.join(bare)})")

    look(tree, "")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_public_functions_bear_types(file):
    assert not untyped(ast.parse(file.read_text(encoding="utf-8")))


def test_a_bare_argument_is_seen():
    assert untyped(ast.parse("def f(x, y: int) -> int: ...")) == ["f(x)"]
    assert untyped(ast.parse("class A:\n    def f(self, y: int): ...")) == ["A.f()"]
    assert untyped(ast.parse("class A:\n    def __init__(self, *y): ...")) == ["A.__init__(y)"]


def test_the_release_is_said_alike():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, name = project["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    assert project["project"]["dynamic"] == ["version"] and getattr(import_module(module), name) == vlm2vec.__version__
