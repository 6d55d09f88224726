"""A plan rides on what is public: no private name of GradCache, of the step or of the attention is touched from `train/plan`."""

import ast

import pytest
import torch

from tests.helpers.repository import ROOT

WATCHED = (
    "kernels/contrastive_kernels/gradcache/grad_cache.py",
    "kernels/contrastive_kernels/gradcache/passes.py",
    "kernels/contrastive_kernels/gradcache/gradient_sync.py",
    "kernels/contrastive_kernels/gradcache/retention.py",
    "train/step.py",
    "train/data/media_stream.py",
    "vlm2vec/attention.py",
    "vlm2vec/model.py",
)
CLASSES = {"GradCache", "ContrastiveStep"}
PLAN = sorted((ROOT / "train" / "plan").glob("*.py"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(path) -> set[str]:
    """Private functions, methods, attributes of self and module variables of a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return {name for name in names if is_private(name)}


def touched(source: str, private: set[str]) -> list[str]:
    """What a file takes of `private` from other objects, imports, or overrides in a subclass of a watched class."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in private and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            found.append(f"line {node.lineno}: .{node.attr}")
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("torch"):
            found += [f"line {node.lineno}: import {alias.name}" for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.ClassDef) and CLASSES & {base.id for base in node.bases if isinstance(base, ast.Name)}:
            found.append(f"line {node.lineno}: {node.name} derives from one of {sorted(CLASSES)}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr"):
            found += [f"line {node.lineno}: {a.value!r}" for a in node.args[1:2] if isinstance(a, ast.Constant) and a.value in private]
    return found


PRIVATE = set().union(*(defined(ROOT / path) for path in WATCHED)) - set(
    dir(torch.nn.Module())
)  # a plan walks over modules as torch has them


@pytest.mark.parametrize("path", PLAN, ids=lambda path: path.name)
def test_no_private_name_is_touched(path):
    assert touched(path.read_text(encoding="utf-8"), PRIVATE) == []


@pytest.mark.parametrize(
    "source",
    [
        "step.gradcache._attempt(sides)",
        "step._loss_options(batch)",
        "attention._PROVIDER_FUNCTIONS['x'] = y",
        "from vlm2vec.attention import _group",
        "class Mine(GradCache):\n    pass",
        "setattr(step, '_finite', [])",
    ],
)
def test_the_test_sees_each_way_of_touching_one(source):
    assert touched(source, PRIVATE)
