"""`/v1/embeddings` as OpenAI's clients say it: what a request asks for, and the answer.

Beyond OpenAI's own: an input may be content parts (texts and `image_url`s with data URIs), `messages` as of a chat are one input, and
`input_type`, "query" or "document", says the words that search says around an input. Nothing names a file or an address to be read.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlm2vec.commands.serve.errors import BadRequest
from vlm2vec.files.documents import kind, parse_json, shown
from vlm2vec.media.images import measure_picture
from vlm2vec.media.sources import is_data_uri, loadable

FIELDS = ("input", "messages", "model", "dimensions", "encoding_format", "input_type", "user")
FORMATS = ("float", "base64")
ROLES = ("query", "document")


@dataclass(frozen=True)
class Asked:
    """A request that was read.

    Attributes:
        inputs: as `VLM2Vec.encode` takes them; pictures are bytes.
        dimensions: numbers of an answer's vectors, or None for all.
        base64: whether vectors are little-endian float32 in base64.
        role: "query", "document" or None.
    """

    inputs: list[Any]
    model: str
    dimensions: int | None
    base64: bool
    role: str | None


@dataclass
class Room:
    """Pixels, width times height: how many one picture may have, and how many are left to all of a request's.

    A picture of one colour is a few bytes a million pixels, so that bytes bound neither the time nor the memory of reading it.
    """

    one: int
    left: int


def parse(body: bytes | bytearray, pixels: int, request_pixels: int | None = None) -> Asked:
    """A request's body.

    Args:
        pixels: width times height that a picture may have. request_pixels: all pictures together; None for any number.

    Raises:
        BadRequest: names the field and what was expected of it.
    """
    try:
        said = parse_json(body.decode(), "the body")
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8 text; send JSON") from None
    except ValueError as e:
        raise BadRequest(str(e)) from None
    if not isinstance(said, dict):
        raise BadRequest(f"expected a JSON object, got {kind(said)}")
    unknown = [name for name in said if name not in FIELDS]
    if unknown:
        raise BadRequest(f"unknown field {shown(unknown[0])}; there are {', '.join(FIELDS)}", unknown[0])
    if ("input" in said) == ("messages" in said):
        raise BadRequest("expected input, or messages, one of them", "input")
    room = Room(pixels, request_pixels or sys.maxsize)
    if "messages" in said:
        inputs = [_messages(said["messages"], room)]
    else:
        inputs = _inputs(said["input"], room)
    return Asked(
        inputs,
        _text(said, "model") or "",
        _dimensions(said.get("dimensions")),
        _one_of(said, "encoding_format", FORMATS, "float") == "base64",
        _one_of(said, "input_type", ROLES, None),
    )


def _text(said: dict, name: str) -> str | None:
    value = said.get(name)
    if value is not None and not isinstance(value, str):
        raise BadRequest(f"{name}: expected a text, got {kind(value)}", name)
    return value


def _one_of(said: dict, name: str, values: tuple[str, ...], default: str | None) -> str | None:
    value = said.get(name)
    if value is None:
        return default
    if value not in values:
        raise BadRequest(f"{name}: expected {' or '.join(values)}, got {kind(value)}", name)
    return value


def _dimensions(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise BadRequest(f"dimensions: expected an integer of at least 1, got {kind(value)}", "dimensions")
    return value


def _inputs(given: Any, pixels: Room) -> list[Any]:
    """One text, a list of inputs, or one input of content parts."""
    if isinstance(given, (str, dict)):
        return [_input(given, "input", pixels)]
    if not isinstance(given, list):
        raise BadRequest(f"input: expected a text or a list, got {kind(given)}", "input")
    if not given:
        raise BadRequest("input: an empty list; expected a text, or a list of inputs", "input")
    if all(isinstance(part, dict) and "type" in part for part in given):
        return [_parts(given, "input", pixels)]
    return [_input(x, f"input[{i}]", pixels) for i, x in enumerate(given)]


def _input(x: Any, where: str, pixels: Room) -> Any:
    if isinstance(x, str):
        return picture(x, where, pixels) if is_data_uri(x) else x
    if isinstance(x, bool) or isinstance(x, (int, float)) or (isinstance(x, list) and x and all(isinstance(n, int) for n in x)):
        raise BadRequest(f"{where}: token ids are not read here, since tokens depend on the model; send the text", "input")
    if isinstance(x, list) and x:
        return _parts(x, where, pixels)
    if isinstance(x, dict) and "content" in x:
        return _message({"role": "user", **x}, where, pixels)
    if isinstance(x, dict) and "type" in x:
        return _parts([x], where, pixels)
    raise BadRequest(f"{where}: expected a text, a list of content parts, or an object with content, got {kind(x)}", "input")


def _messages(given: Any, pixels: Room) -> list[dict]:
    if not isinstance(given, list) or not given:
        raise BadRequest(f"messages: expected a list of messages, got {kind(given)}", "messages")
    return [_message(one, f"messages[{i}]", pixels)[0] for i, one in enumerate(given)]


def _message(one: Any, where: str, pixels: Room) -> list[dict]:
    """A chat of one message, as the model takes it."""
    if not isinstance(one, dict) or set(one) - {"role", "content"}:
        raise BadRequest(f"{where}: expected an object with role and content, got {kind(one)}", where.partition("[")[0])
    if one.get("role") not in ("user", "system"):
        raise BadRequest(f"{where}: role {shown(one.get('role'))}; expected user or system", where.partition("[")[0])
    content = one.get("content")
    if isinstance(content, str):
        return [{"role": one["role"], "content": content}]
    if not isinstance(content, list) or not content:
        raise BadRequest(f"{where}.content: expected a text or content parts, got {kind(content)}", where.partition("[")[0])
    return [{**_parts(content, f"{where}.content", pixels)[0], "role": one["role"]}]


def _parts(parts: list, where: str, pixels: Room) -> list[dict]:
    return [{"role": "user", "content": [_part(part, f"{where}[{i}]", pixels) for i, part in enumerate(parts)]}]


def _part(part: Any, where: str, pixels: Room) -> dict:
    field = where.partition("[")[0].partition(".")[0]
    said = part.get("type") if isinstance(part, dict) else None
    if said in ("text", "input_text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if said in ("image_url", "input_image", "image"):
        given = part.get("image_url", part.get("image"))
        url = given.get("url") if isinstance(given, dict) else given
        return {"type": "image", "image": picture(url, where, pixels)}
    what = kind(part) if said is None else f"type {shown(said)}"
    raise BadRequest(
        f'{where}: expected {{"type": "text", "text": ...}} or {{"type": "image_url", "image_url": {{"url": ...}}}}, got {what}', field
    )


def picture(url: Any, where: str, pixels: Room) -> bytes:
    """The bytes of a data URI, whose header says that it is a picture of no more pixels than there is room for."""
    field = where.partition("[")[0].partition(".")[0]
    if not is_data_uri(url):
        told = f"{kind(url)}" if not isinstance(url, str) else repr(url[:40])
        raise BadRequest(f"{where}: expected a data URI, data:image/png;base64,..., got {told}; addresses and files are not read", field)
    try:
        content = loadable(url)
        width, height = measure_picture(content, max_pixels=pixels.one).size
    except ValueError as e:
        raise BadRequest(f"{where}: {e}", field) from None
    pixels.left -= width * height
    if pixels.left < 0:
        raise BadRequest(f"{where}: with it the pictures of this request have more pixels than one may have; send several requests", field)
    return content


def answer(vectors: torch.Tensor, asked: Asked, model: str, tokens: int, cut: Sequence[int] = ()) -> bytes:
    """The JSON of an answer.

    Args:
        vectors: (n, D) float32 of length 1.
        tokens: of all inputs, those of pictures counted. cut: places of inputs whose text lost its end; OpenAI's own server refuses them.
    """
    rows = vectors.numpy().astype("<f4", copy=False)
    made = [base64.b64encode(row.tobytes()).decode() for row in rows] if asked.base64 else rows.tolist()
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(made)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    said = {"object": "list", "data": data, "model": model, "usage": usage, **({"truncated": list(cut)} if cut else {})}
    return json.dumps(said, separators=(",", ":")).encode()
