"""`vlm2vec data preview RECIPE`: training rows as the model will see them, in the terminal and as a page with their pictures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..data.shown_rows import LOOKED_AT, SourceShown, counts, preview
from ..recipe.schema import Recipe, load_recipe
from .preview_page import write_preview


def lines(sources: list[SourceShown], recipe: Recipe) -> Iterator[str]:
    """The preview as text."""
    for shown in sources:
        grouped = f" in {shown.groups:,} groups" if shown.groups is not None else ""
        yield f"{shown.name}: {shown.place}, {shown.total:,} rows{grouped}; {shown.trained:,} to train on, {shown.held:,} held out"
        for row, sides in shown.rows:
            if isinstance(sides, str):
                yield f"  row {row} cannot be read: {sides}"
                continue
            yield f"  row {row}"
            for one in sides:
                yield f"    {one.side:<8} {one.tokens:>5} tokens  {_quoted(one.prompt)}"
                yield from (f"    {'':<8} {'':>5}         {line}" for line in one.media)
        for side, tokens in shown.lengths.items():
            yield f"  {side}: {min(tokens):,} to {max(tokens):,} tokens, {int(np.median(tokens)):,} in the middle"
        longest = max((max(tokens) for tokens in shown.lengths.values()), default=0)
        if recipe.chunk_rows is None and longest > recipe.chunk_tokens:
            yield f"  the longest is above chunk_tokens ({recipe.chunk_tokens:,}): say chunk_tokens: {longest} or more"
        yield from (f"  {line}" for line in counts(shown))
        if shown.hint:
            yield f"  note: {shown.hint}"


def _quoted(text: str) -> str:
    shown = text if len(text) <= 300 else f"{text[:200]} ... {text[-80:]}"
    return '"' + shown.replace("\\", "\\\\").replace("\n", "\\n") + '"'


def main(argv: list[str]) -> int:
    """Shows the rows, and writes a page with their pictures."""
    parser = argparse.ArgumentParser(
        prog="vlm2vec data preview",
        description="The first rows of a recipe as the model will see them, and a count of those that cannot be read. Reads no weights.",
        allow_abbrev=False,
        epilog="Any other --key value overrides a key of the recipe, as in a run. RECIPE goes first.",
    )
    parser.add_argument("recipe", help="a recipe's file or name")
    parser.add_argument("--rows", type=int, default=4, help="rows of each source that are shown (default 4; 24 on the page)")
    parser.add_argument("--every", action="store_true", help=f"look at every row; otherwise at {LOOKED_AT:,} spread over each source")
    parser.add_argument("--decode", action="store_true", help="decode pictures too: damage behind a header is found, and takes longer")
    parser.add_argument("--html", help="the page to write (default: the recipe's name with -preview.html, in this folder)")
    parser.add_argument("--no-html", action="store_true", help="write no page")
    known, overrides = parser.parse_known_args(argv)
    if known.rows < 0:
        raise ValueError(f"--rows must be 0 or more, got {known.rows}")
    recipe = load_recipe(known.recipe, overrides)
    page_rows = 0 if known.no_html else 24
    sources = preview(recipe, rows=max(known.rows, page_rows), every=known.every, decode=known.decode)
    print("\n".join(lines([replace(shown, rows=shown.rows[: known.rows]) for shown in sources], recipe)))
    if not known.no_html:
        page = known.html or f"{Path(known.recipe).name.removesuffix('.yaml')}-preview.html"
        print(f"page: {write_preview(page, sources, recipe)}")
    unread = next((shown for shown in sources if shown.looked_at and len(shown.errors) == shown.looked_at), None)
    if unread is not None:
        raise ValueError(f"source {unread.name}: none of its {unread.looked_at} rows can be read, the first because of {unread.errors[0]}")
    return 0
