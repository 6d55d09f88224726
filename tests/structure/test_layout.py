"""What keeps the tree readable: few entries to a folder, and no silenced check without its reason."""

import io
import re
import subprocess
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_ENTRIES = 17
CODE = ("kernels", "vlm2vec", "train", "bench", "tests", "examples", "docs")
SILENCER = re.compile(r"#\s*(noqa|fmt:\s*(?:skip|off)|type:\s*ignore)(.*)")
RULES = re.compile(r"^(?:\[[\w\-, ]*\]|:\s*[A-Z]+[0-9]+(?:\s*,\s*[A-Z]+[0-9]+)*)?")


def tracked() -> list[Path]:
    """Files that git holds, relative to the root; without git (an unpacked archive) those that lie there."""
    try:
        listed = subprocess.run(["git", "ls-files", "--cached"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        listed = [str(path.relative_to(ROOT)) for name in CODE for path in (ROOT / name).rglob("*") if path.is_file()]
    return [Path(name) for name in listed if "__pycache__" not in name and (ROOT / name).exists()]


def entries(files: list[Path]) -> dict[Path, set[str]]:
    """What each folder holds directly: files and folders."""
    folders: dict[Path, set[str]] = defaultdict(set)
    for path in files:
        for parent in path.parents:
            folders[parent].add(path.relative_to(parent).parts[0])
    return folders


def is_package(folder: Path) -> bool:
    """Top-level folders and packages; data (recipes, golden vectors, plans) may be as many files as it is."""
    return len(folder.parts) == 1 or (ROOT / folder / "__init__.py").exists()


def test_folders_are_small():
    held = {
        str(folder): len(names)
        for folder, names in entries(tracked()).items()
        if folder.parts and folder.parts[0] in CODE and is_package(folder) and len(names) > MOST_ENTRIES
    }
    assert not held, f"more than {MOST_ENTRIES} entries: {held}; move files that change together into a folder of their own"


def unexplained(text: str) -> list[int]:
    """Lines whose comment silences a check and says nothing else."""
    lines = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        found = SILENCER.search(token.string) if token.type == tokenize.COMMENT else None
        if found:
            before = token.string[: found.start()].strip("# ")
            after = RULES.sub("", found.group(2).strip(), count=1).strip(" :()-")
            if not re.search(r"[a-z]{3}", before + " " + after):
                lines.append(token.start[0])
    return lines


@pytest.mark.parametrize(
    "line, good",
    [
        ("import a  # noqa: F401", False),
        ("import a  # noqa", False),
        ("x = [1,  2]  # fmt: skip", False),
        ("import a  # noqa: F401 (imported before the clock starts)", True),
        ("x = [1,  2]  # columns of a table  # fmt: skip", True),
        ("x = '# noqa'", True),
    ],
)
def test_a_silencer_needs_a_reason(line, good):
    assert (unexplained(line + "\n") == []) == good


def test_no_silencer_without_a_reason():
    silent = []
    for path in tracked():
        if path.suffix == ".py":
            silent += [f"{path}:{line}" for line in unexplained((ROOT / path).read_text(encoding="utf-8"))]
    assert not silent, f"say why on the same line: {silent}"
