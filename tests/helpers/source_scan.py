"""Reading this project's own source: which files there are, and what stands in them beside comments and docstrings."""

import ast
import io
import tokenize
from collections.abc import Iterator

from tests.helpers.repository import ROOT

NAMED = {tokenize.NAME, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}  # f-strings are split from 3.12 on


def modules(*folders: str) -> Iterator[tuple[str, str]]:
    """(path from the repository's root, source) of each Python module in the folders, their tests left out."""
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if not file.name.startswith("test_"):
                yield file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")


def code_words(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each name and string of a source, comments and docstrings left out."""
    docstrings = {
        node.body[0].lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in NAMED and not (token.type == tokenize.STRING and token.start[0] in docstrings):
            yield token.start[0], token.string


def literal_collections(source: str) -> Iterator[tuple[int, list[str]]]:
    """(line, strings) of each list, tuple, set and dictionary that is spelled out; a dictionary's are its keys."""
    for node in ast.walk(ast.parse(source)):
        entries = node.elts if isinstance(node, (ast.List, ast.Tuple, ast.Set)) else node.keys if isinstance(node, ast.Dict) else []
        strings = [entry.value for entry in entries if isinstance(entry, ast.Constant) and isinstance(entry.value, str)]
        if strings:
            yield node.lineno, strings
