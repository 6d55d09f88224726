"""The README stays readable, and what it and the pages point at is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
MOST_LINES, MOST_CELL = 5, 120
LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)[^)]*\)")


def blocks(text: str) -> list[list[str]]:
    """Paragraphs, lists and tables: runs of lines without an empty one between them, code left out."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [block.splitlines() for block in re.split(r"\n\s*\n", text) if block.strip()]


def test_paragraphs_are_short():
    paragraphs = [block for block in blocks((ROOT / "README.md").read_text()) if not block[0].lstrip().startswith(("|", "#"))]
    long = [block[0] for block in paragraphs if len(block) > MOST_LINES or max(map(len, block)) > 140]
    assert paragraphs and not long, f"paragraphs of more than {MOST_LINES} lines of 140 characters: {long}"


def test_cells_are_short():
    rows = [line for block in blocks((ROOT / "README.md").read_text()) for line in block if line.startswith("|")]
    long = [cell.strip() for row in rows for cell in row.strip("|").split("|") if len(cell.strip()) > MOST_CELL]
    assert rows and not long, f"cells of more than {MOST_CELL} characters: {long}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = [link for link in LINK.findall((ROOT / page).read_text()) if "://" not in link]
    absent = [link for link in targets if not ((ROOT / page).parent / link).exists()]
    assert not absent, f"{page} links to {absent}"


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    """Paths in backticks that start with a folder of this repository."""
    named = re.findall(r"`((?:kernels|vlm2vec|train|bench|tests|docs|examples)/[\w./-]*\w)`", (ROOT / page).read_text())
    absent = sorted({path for path in named if not (ROOT / path).exists() and "NAME" not in path and path != "bench/results"})
    assert not absent, f"{page} names {absent}"


def test_pictures_are_small():
    pictures = list((ROOT / "docs/images").iterdir())
    assert pictures and all(picture.stat().st_size < 150_000 for picture in pictures)
