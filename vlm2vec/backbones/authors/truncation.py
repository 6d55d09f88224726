"""Cuts of a text that is too long, as the authors' tokenizers make them: the end goes, the tokens that close every text stay."""

from __future__ import annotations

from vlm2vec.backbones.visual import Visual


def length_of(pieces: list[int | Visual]) -> int:
    """Tokens of token ids and visuals."""
    return sum(piece.length if isinstance(piece, Visual) else 1 for piece in pieces)


def cut(pieces: list[int | Visual], limit: int, tail: int, *, named: str, mend: str) -> list[int | Visual]:
    """The first pieces that fit, and the last `tail` of them.

    Args:
        limit: most tokens. tail: last tokens that the tokenizer puts behind every text.
        named: the limit, and mend: what makes media shorter, in words.

    Raises:
        ValueError: the cut would take media away, wholly or in part.
    """
    body, closing = (pieces[: len(pieces) - tail], pieces[len(pieces) - tail :]) if tail else (pieces, [])
    room, kept = limit - tail, []
    for piece in body:
        room -= length_of([piece])
        if room < 0:
            break
        kept.append(piece)
    lost = sum(isinstance(piece, Visual) for piece in body[len(kept) :])
    if lost:
        held = length_of([piece for piece in pieces if isinstance(piece, Visual)])
        raise ValueError(
            f"{named}: expected room for the input's {held} image and video tokens, got a cut through {lost} of their runs; {mend}"
        )
    return kept + closing
