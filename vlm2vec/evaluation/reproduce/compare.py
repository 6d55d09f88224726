"""What differs between two runs' records, and of what kind each difference is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlm2vec.files.documents import shown

FRAME_OPTIONS = ("frames", "fps", "max_frames", "video_fps")
FEEDING_OPTIONS = ("feeding", "chat_template", "layout", "append_eos", "positions")
PICTURE_OPTIONS = ("orientation", "background", "pixels")
# A difference of these kinds moves a score by rounding at most, or says nothing of it.
HARMLESS = ("rounding", "place")
NOT_THERE = object()


@dataclass(frozen=True)
class Difference:
    """One thing that two runs were not made alike in.

    Attributes:
        what: its name, such as "frames" or "max_pixels". there, here: its values.
        kind: frames, limit, prompt, feeding, pictures, protocol, model, tokenizer, precision, data, media, answers, task or version;
            "rounding" and "place" (of `HARMLESS`) explain no score.
    """

    what: str
    there: Any
    here: Any
    kind: str

    def __str__(self) -> str:
        if self.kind in ("data", "media", "answers", "model", "tokenizer") and _is_digest(self.there) and _is_digest(self.here):
            return f"{self.what}: not the same"
        return f"{self.what}: {_short(self.there)} there, {_short(self.here)} here"


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[Difference]:
    """What differs between two records of one task (`record.run_record`), the likeliest causes first. A part that one of them does not
    hold is not compared.

    Example:
        >>> differences({"settings": {"frames": "8"}}, {"settings": {"frames": "4"}})[0].what
        'frames'
    """
    found = []
    for part, name, a, b in _pairs(there, here):
        if a is NOT_THERE or b is NOT_THERE or a == b:
            continue
        what, kind = _named(part, name)
        if kind:
            found.append(Difference(what, a, b, kind))
    return _without_consequences(found)


def _pairs(there: dict, here: dict):
    """(part, name, there, here), the model's options and named prompts one by one."""
    for part in ("settings", "task", "model", "data", "versions"):
        a, b = there.get(part) or {}, here.get(part) or {}
        for name in dict.fromkeys([*a, *b]):
            old, new = a.get(name, NOT_THERE), b.get(name, NOT_THERE)
            if part == "model" and name in ("options", "prompts") and isinstance(old, dict) and isinstance(new, dict):
                for key in dict.fromkeys([*old, *new]):
                    yield name, key, old.get(key, NOT_THERE), new.get(key, NOT_THERE)
            else:
                yield part, name, old, new


SETTINGS = {
    "protocol": "protocol",
    "feeding": "feeding",
    "frames": "frames",
    "frames_everywhere": "frames",
    "prompt": "prompt",
    "pictures": "pictures",
}
MODEL = {"name": "place", "revision": "model", "dtype": "precision", "tokenizer": "tokenizer"}
DATA = {
    "queries": ("number of queries", "data"),
    "candidates": ("number of candidates", "data"),
    "query_texts": ("texts of the queries", "data"),
    "candidate_texts": ("texts of the candidates", "data"),
    "first_query": ("first query", "prompt"),
    "first_candidate": ("first candidate", "prompt"),
    "media": ("pictures or frames", "media"),
    "answers": ("right answers or candidate lists", "answers"),
    "affected_rows": ("rows that could not be scored whole", "data"),
}


def _named(part: str, name: str) -> tuple[str, str | None]:
    """The name of a difference and its kind; None for one that is told by another."""
    if part == "settings":
        return name.replace("_", " "), "precision" if name == "device" else SETTINGS.get(name, "rounding")
    if part == "options":
        if name in FRAME_OPTIONS:
            return f"option {name}", "frames"
        return name, "feeding" if name in FEEDING_OPTIONS else "pictures" if name in PICTURE_OPTIONS else "limit"
    if part == "prompts":
        return f"the model's prompt {name!r}", "prompt"
    if part == "task":
        return name.replace("_", " "), "prompt" if name.endswith("_prompt") else "task"
    if part == "model":
        return f"model {name}" if name != "name" else "model", MODEL.get(name, "model")
    if part == "data":
        return DATA.get(name, (name, "place"))
    return name, "version"


ORDER = "frames limit prompt feeding pictures protocol task model tokenizer data media answers precision version rounding place".split()


def _without_consequences(found: list[Difference]) -> list[Difference]:
    """Causes without what follows from them: other frames are other media, another prompt is another text."""
    kinds = {d.kind for d in found}
    whats = {d.what for d in found}
    if "frames" in whats:
        found = [d for d in found if d.kind != "frames" or d.what == "frames"]
    if "frames" in kinds:
        found = [d for d in found if d.kind != "media"]
    if "prompt" in kinds:
        found = [d for d in found if d.what not in ("texts of the queries", "texts of the candidates")]
    if {"query prompt", "target prompt"} & whats:
        found = [d for d in found if d.what not in ("first query", "first candidate")]
    return sorted(found, key=lambda d: ORDER.index(d.kind))


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) >= 16 and all(c in "0123456789abcdef" for c in value)


def _short(value: Any) -> str:
    return (
        "none" if value is None else shown(value) if isinstance(value, (str, dict, list)) else f"{value:,}" if _big(value) else str(value)
    )


def _big(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000
