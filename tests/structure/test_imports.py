"""Who imports whom: no circles between files, lazy imports counted, and a kernel package that also loads under another name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"contrastive_kernels": ROOT / "kernels", "vlm2vec": ROOT, "train": ROOT, "bench": ROOT}

# What the tables of bench share; a table's own folder or file imports nothing of another table.
BENCH_SHARED = {"measure", "tables", "models", "options", "peers"}


def modules() -> dict[str, Path]:
    """Every module of the four packages by its dotted name."""
    table = {}
    for package, base in PACKAGES.items():
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            table[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return table


def imported(name: str, path: Path, known) -> set[str]:
    """Modules among `known` that one imports, wherever in the file the import stands."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            # `from package import name`: the module of that name where there is one, else the package itself
            out |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return (out & set(known)) - {name}


def graph(table: dict[str, Path]) -> dict[str, set[str]]:
    return {name: imported(name, path, table) for name, path in table.items()}


def circles(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """Strongly connected components of two modules or more: those that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in edges:
        seen, queue = set(), [start]
        while queue:
            for following in edges[queue.pop()] - seen:
                seen.add(following)
                queue.append(following)
        reached[start] = seen
    together = (frozenset(b for b in reached[a] if a in reached[b]) for a in edges)
    return {circle for circle in together if len(circle) > 1}


def test_the_search_finds_circles():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f"}, "f": {"e"}}
    assert circles(edges) == {frozenset("abc"), frozenset("ef")}


def test_imports_are_read_as_python_reads_them(tmp_path):
    known = {"p", "p.a", "p.sub", "p.sub.b"}
    (tmp_path / "sub").mkdir()
    module, package = tmp_path / "sub" / "b.py", tmp_path / "sub" / "__init__.py"
    module.write_text("from .. import a\ndef late():\n    from . import nothing\n    import json\n")
    package.write_text("from . import b\nfrom ..a import x\nimport p.a\n")
    assert imported("p.sub.b", module, known) == {"p.a", "p.sub"}
    assert imported("p.sub", package, known) == {"p.sub.b", "p.a"}


def test_no_circles_of_imports():
    """Also of imports inside functions: a lazy import hides a circle and mends none."""
    found = circles(graph(modules()))
    assert not found, f"files that import each other: {[sorted(circle) for circle in found]}; move what they share into a file of its own"


@pytest.mark.parametrize(
    "package, above", [("contrastive_kernels", {"vlm2vec", "train", "bench"}), ("vlm2vec", {"bench"}), ("train", {"bench"})]
)
def test_imports_go_downward(package, above):
    """bench and train use vlm2vec, which uses contrastive_kernels, which needs torch alone."""
    upward = {
        name: sorted(target for target in targets if target.split(".")[0] in above)
        for name, targets in graph(modules()).items()
        if name.split(".")[0] == package
    }
    assert not {name: targets for name, targets in upward.items() if targets}


def test_the_kernels_import_each_other_relatively():
    """The folder also loads under another name, as Kernel Hub lays packages out."""
    wrong = []
    for name, path in modules().items():
        if name.split(".")[0] != "contrastive_kernels":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno}" for each in names if each.split(".")[0] == "contrastive_kernels"]
    assert not wrong, f"absolute imports of the package by itself: {wrong}"


def test_the_tables_of_bench_share_what_is_shared_and_nothing_else():
    sideways = []
    for name, targets in graph(modules()).items():
        table = name.split(".")[1] if name.startswith("bench.") else ""
        for target in targets:
            other = target.split(".")[1] if target.startswith("bench.") else ""
            if table and table != "__main__" and other and other != table and other not in BENCH_SHARED:
                sideways.append(f"{name} -> {target}")
    assert not sideways, f"move what two tables need into bench/{{{', '.join(sorted(BENCH_SHARED))}}}: {sideways}"
