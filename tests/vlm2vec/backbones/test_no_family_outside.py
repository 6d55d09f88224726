"""A family of backbones is named in its own files and in the registry, and nowhere else: all others ask the backbone."""

import re

from tests.helpers.source_scan import code_words, modules
from vlm2vec.backbones import FAMILIES

STEMS = sorted({re.match("[a-z]+", name).group() for name in FAMILIES})
NAME = re.compile(rf"(?<![A-Za-z])(?i:{'|'.join(STEMS)})(?![a-z])")
OWN_FILES = re.compile(rf"vlm2vec/backbones/({'|'.join(STEMS)})[a-z0-9_]*(/[a-z0-9_]+)?\.py")
EXCEPTIONS = {
    "vlm2vec/backbones/__init__.py": "the registry",
    "vlm2vec/quickstart/tiny_model.py": "builds the quickstart's model out of one architecture's classes; it does not ask which one it got",
    "vlm2vec/quickstart/report.py": "says to readers which architecture that is",
    "vlm2vec/backbones/authors/feeding.py": "what the embedders of one base share",
    "vlm2vec/backbones/authors/qwen3_vl_embedding.py": "an embedder's own file",
    "vlm2vec/backbones/authors/wemm.py": "another's",
}


def named(source: str) -> list[tuple[int, str]]:
    """(line, word) of each word of the code that names a family."""
    return [(line, word) for line, word in code_words(source) if NAME.search(word)]


def test_no_family_is_named_outside_its_file_and_the_registry():
    seen = {name: named(source) for name, source in modules("vlm2vec", "train") if not OWN_FILES.fullmatch(name)}
    assert seen.keys() >= EXCEPTIONS.keys() and all(seen[name] for name in EXCEPTIONS), "an exception that names none goes"
    outside = {name: words for name, words in seen.items() if words and name not in EXCEPTIONS}
    assert not outside, "ask the backbone (vlm2vec/backbones/base.py): a new method or attribute there, its value in the family's file"


def test_a_name_is_seen():
    for source in (
        "x = 'Qwen/Qwen2-VL'",
        "from transformers import Qwen2Config",
        "if kind == 'phi3_v': pass",
        "import llava_next",
        "f'LLaVA {x}'",
    ):
        assert named(source), source
    assert not named('"""Qwen2-VL in a docstring."""\n# and Qwen in a comment\nmorphism = delphi = "philosophy"')
