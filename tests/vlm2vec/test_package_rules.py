"""What holds for the package as a whole: types on what people call, no import circles."""

import ast
import tomllib
from pathlib import Path

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


def imports(root: Path, packages: tuple[str, ...]) -> dict[str, set[str]]:
    """{module: modules of the packages that it imports}, imports inside of functions and under TYPE_CHECKING counted."""
    files = {}
    for file in (file for package in packages for file in (root / package).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    graph = {}
    for module, file in files.items():
        package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        used = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                used |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in files else base for alias in node.names}
        graph[module] = (used & files.keys()) - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of the graph, its first module again at the end; [] where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for used in sorted(graph[module]):
                if ring := walk(used, [*path, module]):
                    return ring
            done.add(module)
        return []

    return next((ring for module in sorted(graph) if (ring := walk(module, []))), [])


def test_no_import_circle():
    graph = imports(ROOT, PACKAGES)
    assert len(graph) > 50 and graph["vlm2vec.model"], "the modules are where this test looks for them"
    assert circle(graph) == []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_release_is_said_alike():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert declared == vlm2vec.__version__
