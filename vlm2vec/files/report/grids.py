"""Queries and their best answers as pictures, the right answer marked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from vlm2vec.files import AnyPath
from vlm2vec.media.images import measure_picture
from vlm2vec.media.inline import inline_image


@dataclass(frozen=True)
class Card:
    """What is shown of a query or an answer: text, an image file, or both."""

    text: str = ""
    image: str | Path = ""


@dataclass(frozen=True)
class Answer:
    card: Card
    right: bool


@dataclass(frozen=True)
class Query:
    """A query, its best answers in order, and, where the right one is not among them, that one with its rank (1 is best)."""

    card: Card
    answers: list[Answer]
    right: Card | None = None
    rank: int | None = None


def grid(queries: list[Query]) -> str:
    """One line a query: the query on the left, its answers from best to worst on the right."""
    return '<div class="grid">' + "".join(_line(query) for query in queries) + "</div>"


def picture_strip(files: Iterable[AnyPath]) -> str:
    """A row of small pictures, cut off where the page ends; decoration, so hidden from screen readers."""
    return '<div class="strip" aria-hidden="true">' + "".join(f'<img alt="" src="{inline_image(f)}">' for f in files) + "</div>"


def _line(query):
    cells = [_cell(answer.card, "right" if answer.right else "wrong", str(place + 1)) for place, answer in enumerate(query.answers)]
    if query.right is not None and not any(answer.right for answer in query.answers):
        cells.append(_cell(query.right, "missed", f"right: no. {query.rank:,}" if query.rank else "right"))
    verdict = "hit" if query.answers and query.answers[0].right else "miss"
    picture = _picture(query.card, flat=True)
    text = f'<p class="ask">{escape(query.card.text)}</p>' if query.card.text else ""
    kind = "" if any(answer.card.image for answer in query.answers) else " texts"
    return (
        f'<div class="query {verdict}"><div class="asked {"" if picture else "words"}">{picture}{text}</div>'
        f'<ol class="answers{kind}">{"".join(cells)}</ol></div>'
    )


def _cell(card, kind, rank):
    text = f'<span class="words">{escape(card.text)}</span>' if card.text else ""
    mark = '<span class="mark" title="the right answer">✓</span>' if kind == "right" else ""
    return f'<li class="{kind}"><div class="card">{_picture(card)}{text}</div><span class="rank">{escape(rank)}</span>{mark}</li>'


def _picture(card, flat=False):
    """The picture as an <img>; with `flat`, one that is wider than high says so to the style."""
    if not card.image:
        return ""
    address = inline_image(card.image)
    if not address:
        return f'<span class="words">{escape(Path(card.image).name)} cannot be shown</span>'
    wide = ' class="flat"' if flat and _is_wide(card.image) else ""
    return f'<img{wide} alt="{escape(card.text or Path(card.image).stem.replace("_", " "))}" src="{address}">'


def _is_wide(file):
    width, height = measure_picture(file).size
    return width > 1.3 * height
