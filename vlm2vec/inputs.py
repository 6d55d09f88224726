"""What a caller may hand to the model, brought to one form.

Accepted: `str` (text), a picture in any form of `vlm2vec.media.sources` (PIL image, NumPy or torch array, bytes, an open file,
`os.PathLike`, `{"bytes":, "path":}`, a data: URI), `{"text":, "image":, "video":, "instruction":}` with any of the keys, and chat
messages (`[{"role":, "content":}]`). A plain string is text, never a path; as the value of "image" it is a path. "text" may be a list,
which is joined. Beside a picture or film may stand what holds for it alone (`SETTINGS`): {"video": "a.mp4", "fps": 2}.

Text holds MMEB's markers `<|image_1|>`, `<|image_2|>`, ... where the visuals stand, by their numbers; a visual without a marker
comes first, followed by a newline when text follows. Videos are marked `<|video_1|>`, ... The model's own tokens (`<image>`,
`<|image_pad|>`) stand for the visuals where a text begins with as many as there are; anywhere else they are text like any other.
"audio" takes a sound in any form of `vlm2vec.media.sounds`, or a list of them; sounds come first and have no markers. Models that
hear nothing refuse them.

Halves of surrogate pairs, which JSON allows and UTF-8 does not, become U+FFFD.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from vlm2vec.media.endings import FILMS
from vlm2vec.media.films import Frames
from vlm2vec.media.sources import is_array, is_data_uri, is_file, is_source_dict

MARKER = re.compile(r"<\|(image|video)_(\d+)\|>")
AROUND_NATIVE = r"\s|<\|vision_start\|>|<\|vision_end\|>"  # what may stand around the model's own tokens at the head of a text
MODALITIES = ("text", "image", "video")
IMAGE_KEYS, VIDEO_KEYS = ("image", "images"), ("video", "videos")
VISUAL_KEYS = IMAGE_KEYS + VIDEO_KEYS
MEDIA_KEYS = (*VISUAL_KEYS, "audio")
ITEM_KEYS = ("text", *MEDIA_KEYS, "instruction")
# What may stand beside one picture or film, under the names of Qwen's own tools; `Processing.takes_settings` says who reads them.
SETTINGS = {
    "image": ("min_pixels", "max_pixels"),
    "video": ("fps", "nframes", "min_frames", "max_frames", "sample_fps", "min_pixels", "max_pixels", "total_pixels"),
}
SETTING_KEYS = tuple(dict.fromkeys(SETTINGS["video"] + SETTINGS["image"]))
NOT_READ = ("resized_height", "resized_width", "video_start", "video_end", "raw_fps")  # their further names
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
        nothing: neither text nor visual was given, which is not the same as an empty text to every embedder.
        system: the instruction is the system message of a chat.
        turns: messages of a chat besides the system's.
        sounds: paths, bytes or waveforms (`vlm2vec.media.sounds`), not opened yet.
        settings: {"image": [...], "video": [...]}: for each picture and each film what the caller says of it (`SETTINGS`); {} for none.
    """

    text: str = ""
    images: list = field(default_factory=list)
    videos: list = field(default_factory=list)
    instruction: str | None = None
    markers_added: bool = False
    markers_are_text: bool = False
    nothing: bool = False
    system: bool = False
    turns: int = 1
    sounds: list = field(default_factory=list)
    settings: dict[str, list[dict]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.text = whole_characters(self.text)
        self.instruction = None if self.instruction is None else whole_characters(self.instruction)

    @property
    def visuals(self) -> int:
        return len(self.images) + len(self.videos)


def whole_characters(text: str) -> str:
    """A text that UTF-8 can hold: halves of surrogate pairs that belong together are joined, others become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def is_image(x: Any) -> bool:
    """A picture in one of the forms of `vlm2vec.media.sources`; a `str` is text, never a path, unless it is a data: URI."""
    if isinstance(x, (bytes, bytearray, memoryview, os.PathLike)) or is_data_uri(x) or is_source_dict(x):
        return True
    if is_array(x):
        return x.ndim in (2, 3) and getattr(x.dtype, "kind", "u") in "buif"
    return type(x).__module__.partition(".")[0] == "PIL" or hasattr(x, "getexif") or is_file(x)


def names_a_file(x: Any, endings: tuple[str, ...]) -> bool:
    """A plain string that is the name of an existing file with one of these endings."""
    return isinstance(x, str) and len(x) < 1024 and "\0" not in x and x.lower().endswith(endings) and os.path.isfile(x)


def _listed(x) -> list:
    if x is None or (isinstance(x, str) and not x):
        return []
    return list(x) if isinstance(x, (list, tuple)) or (is_array(x) and x.ndim == 4) else [x]


def _videos(x) -> list:
    """A path is one video; a list of frames (also one array of them) is one video; a list that holds films or frame lists is several."""
    if x is None or (isinstance(x, str) and not x):
        return []
    if is_array(x):
        return [list(x)]
    if isinstance(x, (list, tuple)):
        if any(_is_film(each) for each in x):
            return [each if isinstance(each, (str, os.PathLike, dict, Frames)) else list(each) for each in x]
        return [x if isinstance(x, Frames) else list(x)] if x else []
    return [x]


def _is_film(x: Any) -> bool:
    """A list of frames or one array of them, or the name of a film file: what a frame is not."""
    if isinstance(x, (str, os.PathLike)):
        return os.fspath(x).lower().endswith(FILMS)
    return isinstance(x, (list, tuple)) or (is_array(x) and x.ndim == 4)


def _from_dict(x: dict, native: Mapping[str, str]) -> Item:
    unknown = [k for k in x if k not in ITEM_KEYS + SETTING_KEYS]
    if unknown:
        raise ValueError(
            f"input has unknown keys {unknown}; use {', '.join(ITEM_KEYS)}, and of films and pictures {', '.join(SETTING_KEYS)}"
        )
    text = x.get("text")
    if isinstance(text, (list, tuple)) and all(isinstance(part, str) for part in text):
        text = "".join(text) if text else None
    for key, given in (("text", text), ("instruction", x.get("instruction"))):
        if given is not None and not isinstance(given, str):
            raise ValueError(f"{key!r} must be a str, got {type(given).__name__}")
    images = [image for key in IMAGE_KEYS for image in _listed(x.get(key))]
    videos = [video for key in VIDEO_KEYS for video in _videos(x.get(key))]
    sounds = x.get("audio")
    sounds = [] if sounds is None or (isinstance(sounds, str) and not sounds) else sounds if isinstance(sounds, list) else [sounds]
    named = [k for k in VISUAL_KEYS if k in x]
    settings = {"image": [settings_of(x, "image")] * len(images), "video": [settings_of(x, "video")] * len(videos)}
    item = Item(
        text or "",
        images,
        videos,
        x.get("instruction"),
        markers_are_text=bool(named) and not images and not videos,
        nothing=text is None and not images and not videos and not sounds,
        sounds=list(sounds),
        settings=settings if any(settings["image"] + settings["video"]) else {},
    )
    return with_markers(item, native)


def settings_of(x: dict, kind: str) -> dict[str, float]:
    """What a dictionary says of its picture ("image") or film ("video"), by `SETTINGS`.

    Raises:
        ValueError: a value that is no number above 0, or a name of Qwen's own tools that is not read here.
    """
    unread = [name for name in NOT_READ if x.get(name) is not None]
    if unread:
        raise ValueError(
            f"{unread[0]}={x[unread[0]]!r} of a{'n' if kind == 'image' else ''} {kind}: expected one of {', '.join(SETTINGS[kind])}"
        )
    found = {name: x[name] for name in SETTINGS[kind] if x.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{name}={str(value)[:60]!r} of a{'n' if kind == 'image' else ''} {kind}: expected a number above 0")
    return found


def _from_messages(messages: list) -> Item:
    """Chat messages without a chat template: the user's parts in order, the system text as the instruction."""
    item, parts = Item(nothing=True, turns=0), []
    settings: dict[str, list[dict]] = {"image": [], "video": []}
    for message in messages:
        content = message.get("content", "")
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message.get("role") == "system":
            item.instruction, item.system = "".join(p.get("text", "") for p in content), True
            continue
        item.turns += 1
        for part in content:
            kind = part.get("type", next(iter(part)))
            item.nothing = False
            if kind == "text":
                parts.append(part["text"])
            elif kind in ("image", "image_url"):
                item.images.append(_image_of(part))
                settings["image"].append(settings_of(part, "image"))
                parts.append(f"<|image_{len(item.images)}|>\n")
            elif kind == "video":
                videos = _videos(part.get("video", part.get("path")))
                item.videos += videos
                settings["video"] += [settings_of(part, "video")] * len(videos)
                parts.append(f"<|video_{len(item.videos)}|>\n")
            else:
                raise ValueError(f"chat part of type {kind!r}: expected text, image or video")
    text = "".join(parts)
    ends_with_visual = bool(parts) and MARKER.fullmatch(parts[-1][:-1]) is not None and item.visuals > 0
    item.text, item.markers_added = text[:-1] if ends_with_visual else text, item.visuals > 0
    item.settings = settings if any(settings["image"] + settings["video"]) else {}
    return item


def _image_of(part: dict) -> Any:
    """The picture of a chat part, under any of the names that libraries give it."""
    given = next((part[name] for name in ("image", "image_url", "path", "url") if part.get(name) is not None), None)
    if given is None and part.get("base64") is not None:
        return {"base64": part["base64"]}
    if given is None:
        raise ValueError("chat part of type 'image' without a picture; give it as image, image_url, path, url or base64")
    return given


def with_markers(item: Item, native: Mapping[str, str] = {}) -> Item:
    """An item in whose text markers stand in the order of its visuals. The caller's is left alone.

    Missing markers come first, then a newline if text follows. Numbers say which visual stands where.

    Args:
        native: the model's own markers and the kind of each (`Processing.markers`).

    Raises:
        ValueError: as many markers as visuals, whose numbers name no visual or one of them twice.
    """
    if not item.visuals:
        return item
    if not MARKER.search(item.text):
        item = _native_head(item, native)
    if not MARKER.search(item.text):
        marks = [f"<|image_{i + 1}|>" for i in range(len(item.images))]
        marks += [f"<|video_{i + 1}|>" for i in range(len(item.videos))]
        text = "\n".join(marks + [item.text]) if item.text else "\n".join(marks)
        return replace(item, text=text, markers_added=True)
    return _by_number(_by_number(item, "image"), "video")


def _native_head(item: Item, native: Mapping[str, str]) -> Item:
    """The model's own markers at the head of a text as MMEB's, where they are as many as the visuals."""
    if not native:
        return item
    ours = "|".join(map(re.escape, native))
    head = re.match(rf"(?:{AROUND_NATIVE}|{ours})*", item.text).group(0)
    kinds = [native[marker] for marker in re.findall(ours, head)]
    if (kinds.count("image"), kinds.count("video")) != (len(item.images), len(item.videos)):
        return item
    numbers = {"image": count(1), "video": count(1)}
    marked = re.sub(ours, lambda found: f"<|{native[found.group(0)]}_{next(numbers[native[found.group(0)]])}|>", head)
    return replace(item, text=marked + item.text[len(head) :])


def _by_number(item: Item, kind: str) -> Item:
    """The visuals of a kind in the order in which the text names them, numbered anew. All named 1, or a wrong count: as it is."""
    visuals = item.images if kind == "image" else item.videos
    numbers = [int(number) for named, number in MARKER.findall(item.text) if named == kind]
    if len(numbers) != len(visuals) or numbers == sorted(numbers) == list(range(1, len(numbers) + 1)):
        return item  # a wrong count is told by the family, which knows what it takes
    if len(numbers) > 1 and set(numbers) == {1}:
        return item  # MMEB names every picture 1
    if sorted(numbers) != list(range(1, len(numbers) + 1)):
        raise ValueError(
            f"input {item.text[:80]!r} names {kind}s {', '.join(map(str, numbers))}; number the {len(visuals)} given from 1, each once"
        )
    fresh = count(1)
    text = MARKER.sub(lambda found: f"<|{kind}_{next(fresh)}|>" if found.group(1) == kind else found.group(0), item.text)
    settings = dict(item.settings)
    if settings:
        settings[kind] = [settings[kind][number - 1] for number in numbers]
    return replace(item, text=text, settings=settings, **{f"{kind}s": [visuals[number - 1] for number in numbers]})


def as_item(x: Any, native: Mapping[str, str] = {}) -> Item:
    """Bring one input to an `Item`.

    Args:
        native: as for `with_markers`.

    Raises:
        ValueError: for any other type, unknown keys or a chat part of an unknown kind; the message says what is accepted.
    """
    if isinstance(x, Item):
        return with_markers(x, native)
    if isinstance(x, str) and not is_data_uri(x):
        return Item(text=x)
    if isinstance(x, dict) and not is_source_dict(x):
        return _from_messages([x]) if "role" in x else _from_dict(x, native)
    if is_image(x):
        return with_markers(Item(images=[x]), native)
    if isinstance(x, (list, tuple)) and x and all(isinstance(m, dict) and "role" in m for m in x):
        return _from_messages(list(x))
    raise ValueError(
        f"expected text, a picture (PIL image, array, bytes, open file or path object), a dict with {', '.join(ITEM_KEYS)}, "
        f"or chat messages; got {type(x).__name__}"
    )
