"""What a caller may hand to the model, brought to one form.

Accepted: `str` (text), a PIL image, `bytes` of an image file, `os.PathLike` (an image file; a plain string is always text),
`{"text":, "image":, "video":, "instruction":}` with any of the keys, and chat messages (`[{"role":, "content":}]`).

Text holds MMEB's markers `<|image_1|>`, `<|image_2|>`, ... where the visuals stand; a visual without a marker comes first,
followed by a newline when text follows. Videos are marked `<|video_1|>`, ...
"""

import os
import re
from dataclasses import dataclass, field, replace
from typing import Any

MARKER = re.compile(r"<\|(image|video)_\d+\|>")
# What stands for a visual in some model's vocabulary. One that is not this model's is then missed, by an error, and not fed as text.
LIKE_A_MARKER = re.compile(r"<\|?(image|video)(_pad|_\d+)?\|?>")
MODALITIES = ("text", "image", "video")
IMAGE_KEYS, VIDEO_KEYS = ("image", "images"), ("video", "videos")
VISUAL_KEYS = IMAGE_KEYS + VIDEO_KEYS
ITEM_KEYS = ("text", *VISUAL_KEYS, "instruction")
IMAGE_MARKER = "<|image_1|>"  # the first picture's
NOTHING = "  "  # what the reference feeds for a missing text, which alone has no tokens


@dataclass
class Item:
    """One input. `visuals` names the kinds in the order in which they stand in `text`.

    Attributes:
        text: text with `<|image_k|>` / `<|video_k|>` markers where the visuals stand.
        images: PIL images, paths or bytes, not opened yet.
        videos: a path, or a list of frames (PIL images or paths), each.
        instruction: kept apart, because each family lays it out its own way; None when not given.
        markers_added: the markers, each with a newline before the text that follows, were put in here and not by the caller;
            families with a chat template take the newlines out again.
        markers_are_text: the caller said that there is no visual (`"image": None` or `""`), so that a marker in the text is
            one ordinary token, as the reference feeds WebQA and EDIS queries.
    """

    text: str = ""
    images: list = field(default_factory=list)
    videos: list = field(default_factory=list)
    instruction: str | None = None
    markers_added: bool = False
    markers_are_text: bool = False

    @property
    def visuals(self) -> int:
        return len(self.images) + len(self.videos)


def is_image(x: Any) -> bool:
    """A PIL image, a path object or the bytes of an image file (a `str` is text, never a path)."""
    if isinstance(x, (bytes, bytearray, os.PathLike)):
        return True
    return type(x).__module__.partition(".")[0] == "PIL" or hasattr(x, "getexif")


def _listed(x) -> list:
    if x is None or (isinstance(x, str) and not x):
        return []
    return list(x) if isinstance(x, (list, tuple)) else [x]


def _videos(x) -> list:
    """A path is one video; a list of frames is one video; a list of paths or of frame lists is several."""
    if x is None or (isinstance(x, str) and not x):
        return []
    if isinstance(x, (list, tuple)):
        if x and isinstance(x[0], (list, tuple)):
            return [list(v) for v in x]
        return [list(x)] if x else []
    return [x]


def _from_dict(x: dict, native: tuple[str, ...]) -> Item:
    unknown = [k for k in x if k not in ITEM_KEYS]
    if unknown:
        raise ValueError(f"input has unknown keys {unknown}; use {', '.join(ITEM_KEYS)}")
    text = x.get("text")
    for key in ("text", "instruction"):
        if x.get(key) is not None and not isinstance(x[key], str):
            raise ValueError(f"{key!r} must be a str, got {type(x[key]).__name__}")
    images = [image for key in IMAGE_KEYS for image in _listed(x.get(key))]
    videos = [video for key in VIDEO_KEYS for video in _videos(x.get(key))]
    named = [k for k in VISUAL_KEYS if k in x]
    item = Item(text or "", images, videos, x.get("instruction"), markers_are_text=bool(named) and not images and not videos)
    return with_markers(item, native)


def _from_messages(messages: list) -> Item:
    """Chat messages without a chat template: the user's parts in order, the system text as the instruction."""
    item, parts = Item(), []
    for message in messages:
        content = message.get("content", "")
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message.get("role") == "system":
            item.instruction = "".join(p.get("text", "") for p in content)
            continue
        for part in content:
            kind = part.get("type", next(iter(part)))
            if kind == "text":
                parts.append(part["text"])
            elif kind in ("image", "image_url"):
                item.images.append(part.get("image", part.get("image_url", part.get("path"))))
                parts.append(f"<|image_{len(item.images)}|>\n")
            elif kind == "video":
                item.videos += _videos(part.get("video", part.get("path")))
                parts.append(f"<|video_{len(item.videos)}|>\n")
            else:
                raise ValueError(f"chat part of type {kind!r}: expected text, image or video")
    text = "".join(parts)
    item.text, item.markers_added = text[:-1] if text.endswith("|>\n") else text, item.visuals > 0
    return item


def with_markers(item: Item, native: tuple[str, ...] = ()) -> Item:
    """An item whose missing markers are in front: visuals first, then a newline if text follows. The caller's is left alone.

    Args:
        native: the markers of the model's own vocabulary, which stand for visuals as MMEB's do.
    """
    marked = LIKE_A_MARKER.search(item.text) or any(marker in item.text for marker in native)
    if item.visuals and not marked:
        marks = [f"<|image_{i + 1}|>" for i in range(len(item.images))]
        marks += [f"<|video_{i + 1}|>" for i in range(len(item.videos))]
        text = "\n".join(marks + [item.text]) if item.text else "\n".join(marks)
        return replace(item, text=text, markers_added=True)
    return item


def as_item(x: Any, native: tuple[str, ...] = ()) -> Item:
    """Bring one input to an `Item`.

    Args:
        native: as for `with_markers`.

    Raises:
        ValueError: for any other type, unknown keys or a chat part of an unknown kind; the message says what is accepted.
    """
    if isinstance(x, Item):
        return with_markers(x, native)
    if isinstance(x, str):
        return Item(text=x)
    if isinstance(x, dict):
        return _from_messages([x]) if "role" in x else _from_dict(x, native)
    if is_image(x):
        return with_markers(Item(images=[x]), native)
    if isinstance(x, (list, tuple)) and x and all(isinstance(m, dict) and "role" in m for m in x):
        return _from_messages(list(x))
    raise ValueError(
        f"expected text, a PIL image, a path object, a dict with {', '.join(ITEM_KEYS)}, or chat messages; got {type(x).__name__}"
    )
