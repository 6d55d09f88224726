"""The page of `vlm2vec data preview`: rows with their pictures, beside the prompt and its tokens."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from vlm2vec.files import AnyPath
from vlm2vec.files.report import page, section, tiles, write_page
from vlm2vec.media import read_frames
from vlm2vec.media.inline import inline_thumbnail

from ..data.shown_rows import Shown, SourceShown, counts
from ..recipe.schema import Recipe

_SIDE = 220  # pixels of a picture on the page


def write_preview(file: AnyPath, sources: list[SourceShown], recipe: Recipe) -> Path:
    """Writes the page whole or not at all. Returns the file."""
    looked, lost = sum(s.looked_at for s in sources), sum(len(s.errors) for s in sources)
    longest = max((max(tokens) for s in sources for tokens in s.lengths.values()), default=0)
    head = tiles(
        [
            ("rows", f"{sum(s.total for s in sources):,}", f"{len(sources)} sources" if len(sources) > 1 else sources[0].place),
            ("cannot be read", f"{lost:,}", f"of {looked:,} looked at"),
            ("held out", f"{sum(s.held for s in sources):,}", "scored, never trained on"),
            ("longest", f"{longest:,}", f"tokens; chunk_tokens is {recipe.chunk_tokens:,}"),
        ]
    )
    parts = [section(shown.name, *_blocks(shown), note=shown.place) for shown in sources]
    return write_page(
        file,
        page(
            "What the model will see",
            head,
            *parts,
            kicker="Training data",
            lead=f"The first rows as they are fed to {recipe.model}: every prompt as its tokens say it, pictures as they are read.",
        ),
    )


def _blocks(shown: SourceShown) -> list[str]:
    rows = "".join(_row(row, sides) for row, sides in shown.rows)
    trouble = list(counts(shown)) if shown.errors or shown.left_out else []
    told = f'<pre class="told">{escape(chr(10).join(trouble))}</pre>' if trouble else ""
    hint = f'<p class="note">{escape(shown.hint)}</p>' if shown.hint else ""
    return [told, hint, f'<div class="grid">{rows}</div>']


def _row(row: int, sides: list[Shown] | str) -> str:
    if isinstance(sides, str):
        return f'<div class="fed broken"><span class="rank">row {row}</span><p class="ask">{escape(sides)}</p></div>'
    return f'<div class="fed"><span class="rank">row {row}</span><div class="sides">{"".join(map(_side, sides))}</div></div>'


def _side(one: Shown) -> str:
    pictures = "".join(_picture(source, line) for source, line in zip(_sources(one.item), [*one.media, *[""] * 9]))
    facts = "".join(f"<li>{escape(line)}</li>" for line in one.media)
    return (
        f'<div class="side"><h3>{escape(one.side)} <span class="kind">{one.tokens:,} tokens</span></h3>{pictures}'
        f'<p class="prompt">{escape(one.prompt)}</p><ul class="media">{facts}</ul></div>'
    )


def _sources(item: dict[str, Any]) -> list[Any]:
    """Pictures to show of an input; of a film its first frame."""
    images = item.get("image") or []
    found = list(images) if isinstance(images, list) else [images]
    if item.get("video"):
        try:
            found += read_frames(item["video"], 1)[:1]
        except ValueError:
            pass  # told among the rows that cannot be read
    return found


def _picture(source: Any, line: str) -> str:
    address = inline_thumbnail(source, _SIDE)
    return f'<img alt="{escape(line)}" src="{address}">' if address else f'<span class="words">cannot be shown: {escape(line)}</span>'
