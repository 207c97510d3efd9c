"""What an image's bytes are, told without decoding it where nothing looks odd.

ImageNet has a PNG and CMYK JPEGs among its .JPEG files, grayscale ones by the thousand, and some that cameras held
sideways; copies of it have files that were cut or are empty.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import simplejpeg
from PIL import Image, UnidentifiedImageError

QUALITY = 95
"""Of the JPEG that an image of another format becomes."""
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
"""PIL's names of the formats that are taken for images."""
KEPT, ENCODED, LEFT_OUT = "kept as it is", "encoded as JPEG", "left out"
_START, _END = b"\xff\xd8", b"\xff\xd9"
_TAIL = 64  # bytes in which a complete JPEG has its end marker; some writers pad
_HEAD = 4096  # bytes in which Exif data starts: it comes before all else but a JFIF segment
_ORIENTATION = 0x0112
_OF_PIL = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error,
           Image.DecompressionBombError)  # what its decoders raise over bytes that they do not understand
_ODD_COLOURS = {"Gray": "grayscale", "CMYK": "cmyk", "YCCK": "cmyk"}


class BadImage(ValueError):
    """No image can be had from the bytes; the message says in a few words why."""


class Odd(NamedTuple):
    """An image that is not simply a colour JPEG."""

    oddities: tuple[str, ...]
    """Of `grayscale`, `cmyk`, `exif-rotated`, or the name of another format in small letters."""
    jpeg: bytes | None
    """What to keep in its place; None: the bytes as they are. Orientation is left as torchvision and timm leave it."""


def inspect(content: bytes | memoryview) -> Odd | None:
    """What is odd about an image; None for a colour JPEG with an end (3 us; pixels are not looked at).

    Raises: BadImage if it is empty, cut off, or not an image.
    """
    if content[:2] != _START:
        return _encoded(content)
    try:
        _, _, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        _decode(content)
        colours = ""
    if _END not in bytes(content[-_TAIL:]):
        _decode(content)
    oddities = [_ODD_COLOURS[colours]] if colours in _ODD_COLOURS else []
    if b"Exif\0\0" in bytes(content[:_HEAD]) and _is_rotated(content):
        oddities.append("exif-rotated")
    return Odd(tuple(oddities), None) if oddities else None


def _encoded(content: bytes | memoryview) -> Odd:
    """An image of another format, as the RGB JPEG that PIL's pixels make."""
    if not len(content):
        raise BadImage("empty")
    try:
        with _opened(content, FORMATS) as image:
            file = io.BytesIO()
            image.convert("RGB").save(file, "JPEG", quality=QUALITY)
            return Odd((str(image.format).lower(),), file.getvalue())
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    except _OF_PIL as error:
        raise BadImage(f"cannot be decoded ({error})") from None


def _decode(content: bytes | memoryview) -> None:
    """Decodes a suspicious JPEG with PIL, which refuses one that ends early. Raises: BadImage."""
    try:
        with _opened(content, ("JPEG",)) as image:
            image.load()
    except _OF_PIL as error:
        raise BadImage("truncated" if _END not in bytes(content[-_TAIL:]) else f"damaged ({error})") from None


def _is_rotated(content: bytes | memoryview) -> bool:
    try:
        with _opened(content, ("JPEG",)) as image:
            return image.getexif().get(_ORIENTATION, 1) != 1
    except _OF_PIL:  # Exif data that is damaged: the pixels may still be right
        return False


@contextmanager
def _opened(content: bytes | memoryview, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of palettes, sizes and Exif data: what comes out is right
        with Image.open(io.BytesIO(content), formats=formats) as image:
            yield image
