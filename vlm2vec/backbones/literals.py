"""A model's own markers in a caller's text, as the text that they are.

A caption may speak of the `<image>` tag. Its characters are fed, not the token by that name, whose place would take a picture.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any


class WithLiterals(str):
    """A text in which `literals`, (start, end) of each, are plain text although a special token bears that name."""

    literals: tuple[tuple[int, int], ...] = ()


def swap(text: str, pattern: re.Pattern, marker: Callable[[re.Match], str], own: Sequence[str]) -> str:
    """The text with `marker(match)` in the place of each match, a `WithLiterals` where it held one of `own` before."""
    if not any(name in text for name in own):
        return pattern.sub(marker, text)
    parts, spans, length = [], [], 0
    for at, part in enumerate(re.split(f"({'|'.join(map(re.escape, own))})", text)):
        part = part if at % 2 else pattern.sub(marker, part)
        if at % 2:
            spans.append((length, length + len(part)))
        parts.append(part)
        length += len(part)
    made = WithLiterals("".join(parts))
    made.literals = tuple(spans)
    return made


class LiteralTokenizer:
    """Token ids of `WithLiterals`: as the tokenizer gives them, but for the literals, which it is made to read as characters.

    A twin of the tokenizer reads texts without looking for special tokens; it is made when the first literal comes, and never
    switched, so that threads may share it.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self._twin = tokenizer, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_twin": None}

    def tokenize(self, text: WithLiterals) -> list[int]:
        before, after = self.ends()
        ids, at = [], 0
        for start, end, id_ in self._special_tokens(text):
            ids += self._plain(text[at:start])
            ids.append(id_)
            at = end
        return before + ids + self._plain(text[at:]) + after

    def _plain(self, text: str) -> list[int]:
        """Ids of a run of text, in which no token is special."""
        if not text:
            return []
        if self._twin is None:
            self._twin = copy.deepcopy(self.tokenizer)
        return list(self._twin(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])

    def _special_tokens(self, text: WithLiterals) -> list[tuple[int, int, int]]:
        """(start, end, id) of the special tokens outside of the literals; white space that a token swallows belongs to it."""
        tokens = {token.content: (id_, token) for id_, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        found = []
        for match in re.finditer("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)", text):
            start, end = match.span()
            if any(start < last and first < end for first, last in text.literals):
                continue
            id_, token = tokens[match.group(0)]
            if token.lstrip:
                start = len(text[:start].rstrip())
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip())
            found.append((start, end, id_))
        return found

    def ends(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind every text."""
        whole, bare = (list(self.tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"]) for special in (True, False))
        at = next(at for at in range(len(whole) + 1) if whole[at : at + len(bare)] == bare)
        return whole[:at], whole[at + len(bare) :]
