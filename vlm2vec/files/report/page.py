"""The page around the parts: head, style, sections. No script, no font and no picture from elsewhere."""

from __future__ import annotations

from html import escape
from pathlib import Path

from vlm2vec.files import AnyPath, write_text

STYLE = Path(__file__).with_name("style.css")


def page(title: str, *sections: str, kicker: str = "", lead: str = "", banner: str = "", footer: str = "") -> str:
    """One HTML document.

    Args:
        title, kicker, lead: plain text of the head; `lead` is the sentence under the title.
        sections, banner: HTML from the functions of this package; the banner stands above the title.
        footer: plain text, lines apart.
    """
    style = STYLE.read_text(encoding="utf-8")
    foot = "".join(f"<p>{escape(line)}</p>" for line in footer.splitlines() if line)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n'
        f'<body><main>\n<header>{banner}<p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(lead)}</p></header>\n' + "\n".join(sections) + f"\n<footer>{foot}</footer>\n</main></body></html>\n"
    )


def section(title: str, *blocks: str, note: str = "", level: int = 2) -> str:
    """A headed part of the page; `note` is plain text under the heading."""
    intro = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h{level}>{escape(title)}</h{level}>{intro}{''.join(blocks)}</section>"


def tiles(entries: list[tuple[str, str, str]]) -> str:
    """Large figures side by side: (label, figure, small print), plain text."""
    inside = "".join(
        f'<div class="tile"><span class="label">{escape(label)}</span><span class="figure">{escape(figure)}</span>'
        f'<span class="small">{escape(small)}</span></div>'
        for label, figure, small in entries
    )
    return f'<div class="tiles">{inside}</div>'


def facts(entries: list[tuple[str, str]]) -> str:
    """Names and values in two columns, plain text."""
    return '<dl class="facts">' + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in entries) + "</dl>"


def write_page(file: AnyPath, html: str) -> Path:
    """Write a page whole or not at all. Returns the file.

    Raises:
        ValueError: the folder is not there or cannot be written.
    """
    file = Path(file)
    try:
        write_text(file, html, make_parents=False)
    except OSError as error:
        raise ValueError(f"{file}: cannot be written ({error.strerror}); choose a folder that is there and can be written") from error
    return file
