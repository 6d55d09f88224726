"""Opening pictures: every source, mode and bit depth to 8-bit RGB, with a pixel limit, and errors that name the picture.

Two readings of the same file, chosen by `orientation` and `background`:

    "exif", "white"       what people see: turned as the camera says, transparent pixels on white paper (`encode`, own data)
    "stored", "hidden"    what the reference's `convert("RGB")` sees: as the pixels lie in the file, alpha dropped (MMEB's protocols)
"""

from __future__ import annotations

import io
import os
import struct
from typing import TYPE_CHECKING, Any

from vlm2vec.media.sources import image_name, loadable

if TYPE_CHECKING:
    from PIL.Image import Image


MAX_PIXELS = 178_956_970  # Pillow's own bomb limit: beyond it a small file may unpack to gigabytes
ORIENTATIONS = ("exif", "stored")
BACKGROUNDS = ("white", "hidden")
REFERENCE = {"orientation": "stored", "background": "hidden"}  # how the reference reads pictures, for its published scores
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class Undecoded:
    """An image of which only the header was read: where it comes from, and its (width, height) as it will be shown."""

    def __init__(self, source: Any, size: tuple[int, int]):
        self.source, self.size, self.info = source, size, {}


def measure_picture(x: Any, *, orientation: str = "exif", max_pixels: int = MAX_PIXELS) -> Undecoded:
    """Read an image file's header and nothing more. Arguments and errors as `open_picture`; damage behind the header goes unseen."""
    image = _open(x, max_pixels)
    with image:
        size = image.size[::-1] if _turn(image, orientation) in _SIDEWAYS else image.size
        return Undecoded(x, size)


def open_picture(x: Any, *, orientation: str = "exif", background: str = "white", max_pixels: int = MAX_PIXELS) -> Image:
    """Open one picture as RGB.

    Args:
        x: what `vlm2vec.media.sources` takes: a path, bytes of an image file, a PIL image, an array, ... Animated files give
            their first frame.
        orientation: "exif" turns the picture as its EXIF orientation says; "stored" leaves it as the pixels lie.
        background: "white" lays transparent pixels on white; "hidden" shows the colour that is stored under them.
        max_pixels: largest width * height that is decoded.

    Returns:
        A loaded PIL image of mode "RGB". Sixteen-bit greys are divided by 257, whatever the picture's own maximum.

    Raises:
        ValueError: names the image when it is missing, damaged, not an image, of zero size, over the limit, or of a mode whose
            range of values is not known (floats, 32-bit integers beyond 16 bits).
    """
    for name, value, allowed in (("orientation", orientation, ORIENTATIONS), ("background", background, BACKGROUNDS)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: expected {' or '.join(map(repr, allowed))}")
    image = _open(x, max_pixels)
    name = image_name(x)
    try:
        turn = _turn(image, orientation)  # before the pixels are loaded, so that `measure_picture` sees the same
        image.load()
        image = _to_rgb(image, name, background)
        image = image if turn == 1 else image.transpose(_transpositions()[turn])
    except _Unfit:
        raise
    except Exception as e:  # decoders raise what they like: struct.error, SyntaxError, zlib.error, EOFError, ...
        raise ValueError(f"image {name}: damaged or truncated ({_said(e)})") from e
    if image is not x and not isinstance(x, bytes):
        image.fp = None  # the pixels are loaded; the file handle is not needed any more
    return image


class _Unfit(ValueError):
    """A picture that decodes, but whose values have no known meaning."""


def _said(error: Exception) -> str:
    """A decoder's message in short; its type where it has none or is not about files."""
    message = " ".join(str(error).split())[:200]
    kind = "" if isinstance(error, (OSError, SyntaxError)) and message else type(error).__name__
    return ": ".join(part for part in (kind, message) if part)


def _open(x, max_pixels: int):
    """The image, its pixels not loaded."""
    from PIL import Image, UnidentifiedImageError

    source, name = loadable(x), image_name(x)
    if isinstance(source, Image.Image):
        image = source
    else:
        if not isinstance(source, bytes) and not os.path.isfile(source):
            raise ValueError(f"image {name}: no such file; check the path or the image folder")
        try:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        except UnidentifiedImageError as e:
            raise ValueError(f"image {name}: not an image file that Pillow knows") from e
        except Image.DecompressionBombError as e:
            raise ValueError(f"image {name}: too many pixels ({e}); resize it or raise max_pixels") from e
        except Exception as e:  # see open_picture
            raise ValueError(f"image {name}: cannot be read ({_said(e)})") from e
    width, height = image.size
    if width == 0 or height == 0:
        raise ValueError(f"image {name}: {width} x {height} pixels; an image needs at least one pixel")
    if width * height > max_pixels:
        raise ValueError(f"image {name}: {width} x {height} is over the limit of {max_pixels} pixels; resize it or raise max_pixels")
    return image


def _turn(image, orientation: str) -> int:
    """EXIF orientation that is still to be applied: 1 (as it lies) to 8. Damaged EXIF data turn nothing."""
    if orientation != "exif" or image.format == "TIFF":  # Pillow turns TIFF files itself
        return 1
    try:
        if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info):
            exif = _late_exif(image)  # Pillow would decode the picture to look behind it
        else:
            exif = image.getexif()
        value = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # whatever Pillow's parser stumbles over: the picture itself may be whole
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _late_exif(png):
    """EXIF data of a PNG file whose eXIf chunk stands behind the pixels, found without decoding; {} where there is none."""
    from PIL import Image

    file = getattr(png, "fp", None)
    if file is None or not hasattr(file, "seek"):
        return {}
    at = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                exif = Image.Exif()
                exif.load(b"Exif\0\0" + file.read(length))
                return exif
            file.seek(length + 4, os.SEEK_CUR)
    finally:
        file.seek(at)
    return {}


def _transpositions():
    from PIL.Image import Transpose

    return {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }


def _to_rgb(image, name: str, background: str):
    """RGB of a loaded picture; see `open_picture`."""
    from PIL import Image

    if image.mode == "F":
        raise _Unfit(f"image {name}: float pixels have no known range; convert it to 8 bits first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image, name)
    if image.mode == "La":  # premultiplied grey, which Pillow brings to LA alone
        image = image.convert("LA")
    if background == "white" and image.has_transparency_data:
        shown = image.convert("RGBA")
        paper = Image.new("RGBA", shown.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, shown).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image, name: str):
    """Sixteen-bit greys as 8-bit ones, with alpha where one grey is said to be transparent. Pillow's own conversion clips them to white.

    PNG's 16-bit greys arrive as "I;16" or as "I", depending on the Pillow version; other files use "I" for 32-bit integers.
    """
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype("int64")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise _Unfit(f"image {name}: 32-bit values from {low} to {high} have no known range; convert it to 8 or 16 bits first")
    grey = Image.fromarray(((values + 128) // 257).astype("uint8"))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey = Image.merge("LA", [grey, Image.fromarray(np.where(values == clear, 0, 255).astype("uint8"))])
    return grey
