"""A picture inside of an HTML page."""

import base64
import io
import os
from pathlib import Path
from typing import Any

from vlm2vec.media.endings import SHOWN_BY_BROWSERS
from vlm2vec.media.images import open_picture

LARGEST = 224  # pixels of the longer side


def inline_image(file: str | os.PathLike) -> str:
    """A data URI: small PNG, JPEG, GIF and WebP files as they are, others resized to 224 pixels. "" when it cannot be read."""
    from PIL import Image

    file = Path(file)
    try:
        picture = open_picture(file)
        if max(picture.size) <= LARGEST and file.suffix.lower() in SHOWN_BY_BROWSERS:
            return _uri(SHOWN_BY_BROWSERS[file.suffix.lower()], file.read_bytes())
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    except (ValueError, OSError):
        return ""
    return _jpeg(picture, quality=85)


def inline_thumbnail(file: Any, side: int) -> str | None:
    """A data URI of a JPEG of at most `side` x `side` pixels, None when the picture (in any form of `media.sources`) cannot be read."""
    try:
        picture = open_picture(file)
    except (ValueError, OSError):
        return None
    picture.thumbnail((side, side))
    return _jpeg(picture, quality=80)


def _jpeg(picture, quality: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return _uri("jpeg", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
