"""Opening pictures: every mode to RGB, with a pixel limit, and errors that name the item."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


MAX_PIXELS = 178_956_970  # Pillow's own bomb limit: beyond it a small file may unpack to gigabytes


def image_name(x: Any) -> str:
    if isinstance(x, (bytes, bytearray)):
        return f"{len(x)} bytes"
    if isinstance(x, (str, os.PathLike)):
        name = os.fspath(x)
        return name if len(name) <= 250 else f"{name[:100]}...{name[-100:]}"
    return getattr(x, "filename", None) or f"{type(x).__name__} object"


def _to_rgb(image, name: str):
    """RGB as the reference sees it. Sixteen-bit greys are scaled, because Pillow's own conversion clips them to white."""
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        import numpy as np

        # PNG's 16-bit greys arrive as "I;16" or as "I", depending on the Pillow version
        values = np.asarray(image).astype("float64")
        if values.max(initial=0) > 255:
            values = values / 257
        return Image.fromarray(values.clip(0, 255).round().astype("uint8")).convert("RGB")
    if image.mode == "F":
        raise ValueError(f"image {name}: float pixels have no known range; convert it to 8 bits first")
    return image.convert("RGB")


class Undecoded:
    """An image of which only the header was read: where it comes from, and its (width, height)."""

    def __init__(self, source: Any, size: tuple[int, int]):
        self.source, self.size, self.info = source, size, {}


def measure_image(x: Any, *, max_pixels: int = MAX_PIXELS) -> Undecoded:
    """Read an image file's header and nothing more. Arguments and errors as `open_image`; damage behind the header goes unseen."""
    image, _ = _open(x, max_pixels)
    with image:
        return Undecoded(x, image.size)


def open_image(x: Any, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Open one image as RGB.

    Args:
        x: path, bytes of an image file, or a PIL image. Animated files give their first frame.
        max_pixels: largest width * height that is decoded.

    Returns:
        A loaded PIL image of mode "RGB".

    Raises:
        ValueError: names the image when it is missing, truncated, not an image, of zero size or over the limit.
    """
    image, opened = _open(x, max_pixels)
    name = image_name(x)
    try:
        image.load()
        return _to_rgb(image, name)
    except (OSError, SyntaxError) as e:
        raise ValueError(f"image {name}: damaged or truncated ({e})") from e
    finally:
        if opened and hasattr(image, "close") and image.mode == "RGB" and not isinstance(x, (bytes, bytearray)):
            image.fp = None  # the pixels are loaded; the file handle is not needed any more


def _open(x, max_pixels: int):
    """The image, its pixels not loaded, and whether it was opened here."""
    from PIL import Image, UnidentifiedImageError

    name = image_name(x)
    if isinstance(x, (str, os.PathLike)) and not os.path.isfile(x):
        raise ValueError(f"image {name}: no such file; check the path or the image folder")
    if isinstance(x, str) or isinstance(x, os.PathLike) or isinstance(x, (bytes, bytearray)):
        source = io.BytesIO(x) if isinstance(x, (bytes, bytearray)) else x
        try:
            image = Image.open(source)
        except UnidentifiedImageError as e:
            raise ValueError(f"image {name}: not an image file that Pillow knows") from e
        except Image.DecompressionBombError as e:
            raise ValueError(f"image {name}: too many pixels ({e}); resize it or raise max_pixels") from e
        except (OSError, SyntaxError, ValueError) as e:
            raise ValueError(f"image {name}: cannot be read ({e})") from e
        opened = True
    elif isinstance(x, Image.Image):
        image, opened = x, False
    else:
        raise ValueError(f"expected a path, bytes or a PIL image, got {type(x).__name__}")
    width, height = image.size
    if width == 0 or height == 0:
        raise ValueError(f"image {name}: {width} x {height} pixels; an image needs at least one pixel")
    if width * height > max_pixels:
        raise ValueError(f"image {name}: {width} x {height} is over the limit of {max_pixels} pixels; resize it or raise max_pixels")
    return image, opened
