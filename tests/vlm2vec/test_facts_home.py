"""Each fact has one home: a second list of it, or a second way of doing it, fails here."""

import pytest

from tests.helpers.source_scan import code_words, literal_collections, modules
from vlm2vec.data.row_formats import FORMATS
from vlm2vec.inputs import ITEM_KEYS
from vlm2vec.media.endings import FILMS, PICTURES

FOLDERS = ("vlm2vec", "train")
# fact: (its home, how many of its names in one spelled-out collection make a second list, the names)
LISTS = {
    "row formats": ("vlm2vec/data/row_formats.py", 2, set(FORMATS)),
    "file endings": ("vlm2vec/media/endings.py", 2, {*PICTURES, *FILMS}),
    "modalities": ("vlm2vec/inputs.py", 3, {*ITEM_KEYS, "message"}),
}
# Words by which a module moves a file into its place by hand.
MOVES = {"replace", "rename", "mkdtemp", "NamedTemporaryFile", "fsync"}
WRITERS = {
    "vlm2vec/files/__init__.py": "the home",
    "train/checkpoints.py": "a checkpoint's own order of renames, which `rotate` and a resumed run rely on",
    "train/run.py": "moves a finished model out of its staging folder by checkpoints' rules",
    "train/reports/profile.py": "torch's profiler goes by the ending of the name, which a part's name has not",
    "vlm2vec/checkpoint/merging/streams.py": "a file of weights, tensor by tensor, in a folder that `vlm2vec.files` moves",
    "vlm2vec/evaluation/encode/store.py": "sets a broken shard aside; writes nothing",
}


def second_lists(source: str, least: int, names: set[str]) -> list[int]:
    """Lines of collections that hold `least` of the names and, as far as strings go, nothing else.

    A dictionary with the keys of an input is an input and no list of modalities: its keys are fewer, or it is not all of them.
    """
    return [line for line, strings in literal_collections(source) if len(strings) >= least and set(strings) <= names]


@pytest.mark.parametrize("fact", LISTS)
def test_a_list_has_one_home(fact):
    home, least, names = LISTS[fact]
    seen = {name: second_lists(source, least, names) for name, source in modules(*FOLDERS)}
    assert seen.pop(home), f"the {fact} are where this test looks for them"
    again = {name: lines for name, lines in seen.items() if lines}
    assert not again, f"a second list of {fact} on these lines; import the one of {home}"


def test_a_second_list_is_seen():
    assert second_lists("ENDINGS = ['.png', '.jpg']", 2, {*PICTURES}) == [1]
    assert second_lists("x = 1\nKINDS = {'text': 1, 'image': 2, 'video': 3}", 3, set(ITEM_KEYS)) == [2]
    assert second_lists("row = ('text', 'image'), ['text', 'image', 'depth']", 3, set(ITEM_KEYS)) == []


def moves(source: str) -> set[str]:
    """Which of MOVES a module calls of `os`, `tempfile` or a path: `os.replace`, but not `dataclasses.replace` or `str.replace`."""
    import ast

    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MOVES:
            of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            # a path's own rename and replace take one argument, a string's replace takes two
            by_path = node.func.attr in ("replace", "rename") and len(node.args) == 1 and not node.keywords
            if of in ("os", "tempfile", "shutil") or by_path:
                used.add(node.func.attr)
    return used


def test_files_are_put_in_their_places_by_one_module():
    seen = {name for name, source in modules(*FOLDERS) if moves(source)}
    assert seen == set(WRITERS), "write through vlm2vec.files; what is listed here and does not write by hand any more goes"
    parts = {name for name, source in modules("vlm2vec") if any('.part"' in word or ".part'" in word for _, word in code_words(source))}
    assert parts == {"vlm2vec/files/__init__.py"}, "the name of what is not whole yet is vlm2vec.files' own"


def test_a_move_is_seen():
    assert moves("import os\nos.replace(a, b)") == {"replace"} and moves("part.rename(path)") == {"rename"}
    assert not moves("x = text.replace('a', 'b')\ny = replace(item, text='')")
