"""Where a picture may come from: files, bytes, arrays, undecoded rows of `datasets`, data: URIs, base64, and URLs where allowed.

path, file:// URI               a file
bytes, bytearray, memoryview    the bytes of an image file
io.BytesIO, an open file        its content
PIL image                       itself
NumPy array, torch tensor       (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4; 8 bits, 16 bits, or floats from 0 to 1
{"bytes":, "path":}             as `datasets` gives undecoded pictures; the bytes, where there are any
"data:image/...;base64,..."     the bytes in it
{"base64": "..."}               base64 is never guessed: a bare string is a path
{"url": "..."}, http(s) URL     a data: URI; another one is read by `fetch` alone, which `encode(urls=True)` asks for
"""

from __future__ import annotations

import base64
import binascii
import os
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlparse

SOURCE_KEYS = ("bytes", "path", "base64", "url")
MAX_DOWNLOAD = 64 << 20  # bytes of a picture behind a URL
TIMEOUT = 20.0  # seconds without an answer


def image_name(x: Any) -> str:
    """A short name of a source, for messages."""
    if isinstance(x, dict):
        named = next((x[key] for key in ("path", "url") if isinstance(x.get(key), (str, os.PathLike))), None)
        given = next((value for value in x.values() if value is not None), None)
        return image_name(named if named is not None else given if not isinstance(given, dict) else repr(sorted(x)))
    if isinstance(x, (bytes, bytearray, memoryview)):
        return f"{len(x)} bytes"
    if isinstance(x, (str, os.PathLike)):
        name = os.fspath(x)
        name = name.decode(errors="replace") if isinstance(name, bytes) else name
        return name if len(name) <= 200 else f"{name[:60]}... ({len(name)} characters)"
    if is_array(x):
        return f"{type(x).__name__} {tuple(x.shape)}"
    name = getattr(x, "filename", None) or getattr(x, "name", None)
    return str(name) if name else f"{type(x).__name__} object"


def is_array(x: Any) -> bool:
    """A NumPy array or a torch tensor, neither of which is imported for it."""
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(x).__mro__}
    return bool(kinds & {"numpy.ndarray", "torch.Tensor"})


def is_file(x: Any) -> bool:
    """An open binary file or io.BytesIO."""
    return hasattr(x, "read") and not isinstance(x, (str, os.PathLike))


def is_source_dict(x: Any) -> bool:
    """{"bytes":, "path":}, {"base64":} or {"url":}, and nothing else in it."""
    return isinstance(x, dict) and bool(x) and set(x) <= set(SOURCE_KEYS)


def is_data_uri(x: Any) -> bool:
    return isinstance(x, str) and x[:11].lower() == "data:image/" and "," in x


def is_url(x: Any) -> bool:
    """A string that begins with http:// or https://."""
    return isinstance(x, str) and x[:8].lower().startswith(("http://", "https://"))


def loadable(x: Any) -> Any:
    """A source as one of three: a path, bytes of an image file, or a PIL image.

    Raises:
        ValueError: another type, an array that is no picture, broken base64, a URL.
    """
    from PIL import Image

    if isinstance(x, Image.Image) or isinstance(x, bytes):
        return x
    if isinstance(x, str):
        return _from_string(x)
    if isinstance(x, os.PathLike):
        return os.fspath(x)
    if isinstance(x, (bytearray, memoryview)):
        return bytes(x)
    if is_array(x):
        return _from_array(x)
    if is_source_dict(x):
        return _from_dict(x)
    if is_file(x):
        return _from_file(x)
    raise ValueError(
        f"expected a path, bytes, a PIL image, an array, an open file or a dict with {', '.join(SOURCE_KEYS)}, got {type(x).__name__}"
    )


def fetch(url: str) -> bytes:
    """The bytes behind an http(s) URL.

    Raises:
        ValueError: names the URL when there is no answer, or a longer one than `MAX_DOWNLOAD`.
    """
    from urllib.request import Request, urlopen

    if not is_url(url):
        raise ValueError(f"image {image_name(url)}: expected a URL that begins with http:// or https://")
    try:
        with urlopen(Request(url, headers={"User-Agent": "vlm2vec"}), timeout=TIMEOUT) as answer:
            content = answer.read(MAX_DOWNLOAD + 1)
    except (OSError, ValueError) as e:  # urllib's own errors are OSErrors
        raise ValueError(f"image {image_name(url)}: cannot be fetched ({' '.join(str(e).split())[:200]})") from e
    if len(content) > MAX_DOWNLOAD:
        raise ValueError(f"image {image_name(url)}: more than {MAX_DOWNLOAD >> 20} MiB; download it and give the file")
    return content


def _from_string(x: str) -> Any:
    if is_data_uri(x):
        head, _, body = x.partition(",")
        return _from_base64(body, x) if head.lower().endswith(";base64") else unquote_to_bytes(body)
    if is_url(x):
        raise ValueError(f"image {image_name(x)}: URLs are read only where it is allowed; say encode(..., urls=True), or give the file")
    if x[:7].lower() == "file://":
        return unquote(urlparse(x).path)
    if "\0" in x:
        raise ValueError(f"image {image_name(x)!r}: a path holds no null character")
    if len(x) > 4096:
        raise ValueError(
            f'image {image_name(x)}: too long for a path; base64 goes as {{"base64": "..."}}, a data: URI begins with data:image/'
        )
    return x


def _from_dict(x: dict) -> Any:
    if x.get("base64") is not None:
        if not isinstance(x["base64"], str):
            raise ValueError(f"'base64' must be a str, got {type(x['base64']).__name__}")
        return _from_string(x["base64"]) if is_data_uri(x["base64"]) else _from_base64(x["base64"], x)
    given = next((x[key] for key in ("bytes", "path", "url") if x.get(key) is not None), None)
    if given is None:
        raise ValueError(f"a picture of {', '.join(map(repr, x))} without a value; give its bytes or its path")
    return loadable(given)


def _from_base64(text: str, x: Any) -> bytes:
    try:
        return base64.b64decode("".join(unquote(text).split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise ValueError(f"image {image_name(x)}: not base64 ({e})") from e


def _from_file(x) -> bytes:
    if hasattr(x, "seekable") and x.seekable():
        x.seek(0)
    content = x.read()
    if not isinstance(content, bytes):
        raise ValueError(f"image {image_name(x)}: opened as text; open it with mode 'rb'")
    return content


def _from_array(x):
    """A PIL image of a NumPy array or a torch tensor. Where both readings fit, each library's own: channels last, channels first."""
    import numpy as np
    from PIL import Image

    name, is_tensor = image_name(x), hasattr(x, "detach")
    if is_tensor:
        x = x.detach().cpu()
        x = (x.float() if x.is_floating_point() else x).numpy()  # NumPy has no bfloat16
    if x.ndim not in (2, 3):
        raise ValueError(f"image {name}: expected (H, W), (H, W, C) or (C, H, W)")
    if x.ndim == 3:
        last, first = x.shape[2] in (1, 3, 4), x.shape[0] in (1, 3, 4)
        if not last and not first:
            raise ValueError(f"image {name}: expected 1, 3 or 4 channels first or last")
        x = x.transpose(1, 2, 0) if first and (is_tensor or not last) else x
        x = x[..., 0] if x.shape[2] == 1 else x
    if x.size == 0:
        raise ValueError(f"image {name}: an image needs at least one pixel")
    return Image.fromarray(np.ascontiguousarray(_bytes_of(x, name)))


def _bytes_of(x, name: str):
    """8-bit values by the range that the dtype has."""
    import numpy as np

    if x.dtype == np.uint8:
        return x
    if x.dtype == bool:
        return x.astype(np.uint8) * np.uint8(255)
    if x.dtype == np.uint16:
        return ((x.astype(np.uint32) + 128) // 257).astype(np.uint8)
    low, high = x.min(), x.max()
    if np.issubdtype(x.dtype, np.floating):
        if not (low >= 0 and high <= 1):  # also for NaN
            raise ValueError(f"image {name}: floats are expected from 0 to 1, got {low:.4g} to {high:.4g}; divide by 255, or give uint8")
        return (x.astype(np.float64) * 255).round().astype(np.uint8)
    if np.issubdtype(x.dtype, np.integer):
        if low < 0 or high > 255:
            raise ValueError(f"image {name}: {x.dtype} values are expected from 0 to 255, got {low} to {high}; give uint8 or uint16")
        return x.astype(np.uint8)
    raise ValueError(f"image {name}: {x.dtype} values are no pixels; give uint8")
