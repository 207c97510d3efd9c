"""Inspects the bytes of an image. An image without issues is not decoded.

ImageNet's .JPEG files include a PNG, CMYK JPEGs, thousands of grayscale JPEGs, and images with an EXIF rotation. Copies
of ImageNet also contain truncated and empty files.
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
"""JPEG quality for images that are converted from another format."""

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
"""Accepted image formats, by their names in PIL."""

KEPT, ENCODED, LEFT_OUT = "kept as it is", "encoded as JPEG", "left out"

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"

_TAIL_BYTES = 64  # a complete JPEG has its end marker in the last bytes; some writers add padding

_HEAD_BYTES = 4096  # Exif data starts in the first bytes: only a JFIF segment can precede it

_ORIENTATION = 0x0112

_PIL_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)  # raised by PIL's decoders for invalid bytes

_COLORSPACE_ISSUES = {"Gray": "grayscale", "CMYK": "cmyk", "YCCK": "cmyk"}


class BadImageError(ValueError):
    """The bytes cannot be decoded as an image. The message says why in a few words."""


class ImageIssues(NamedTuple):
    """Issues of an image that is not a plain color JPEG."""

    issues: tuple[str, ...]
    """Any of `grayscale`, `cmyk`, `exif-rotated`, or the name of another format in lower case."""
    replacement: bytes | None
    """The JPEG to store instead, or None to store the original bytes. The EXIF orientation is not applied, as in
    torchvision and timm."""


def inspect_image(content: bytes | memoryview) -> ImageIssues | None:
    """Returns the issues of an image, or None for a complete color JPEG (takes 3 us; pixels are not decoded).

    Raises: BadImageError if the bytes are empty, truncated, or not an image.
    """
    if content[:2] != _SOI:
        return _reencode(content)
    try:
        _, _, colorspace, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        _check_decodable(content)
        colorspace = ""
    if _EOI not in bytes(content[-_TAIL_BYTES:]):
        _check_decodable(content)
    issues = [_COLORSPACE_ISSUES[colorspace]] if colorspace in _COLORSPACE_ISSUES else []
    if b"Exif\0\0" in bytes(content[:_HEAD_BYTES]) and _is_rotated(content):
        issues.append("exif-rotated")
    return ImageIssues(tuple(issues), None) if issues else None


def _reencode(content: bytes | memoryview) -> ImageIssues:
    """Converts an image of another format to an RGB JPEG with PIL."""
    if not len(content):
        raise BadImageError("empty")
    try:
        with _open_image(content, FORMATS) as image:
            file = io.BytesIO()
            image.convert("RGB").save(file, "JPEG", quality=QUALITY)
            return ImageIssues((str(image.format).lower(),), file.getvalue())
    except UnidentifiedImageError:
        raise BadImageError("not an image") from None
    except _PIL_ERRORS as error:
        raise BadImageError(f"cannot be decoded ({error})") from None


def _check_decodable(content: bytes | memoryview) -> None:
    """Decodes a suspicious JPEG with PIL, which rejects truncated files. Raises: BadImageError."""
    try:
        with _open_image(content, ("JPEG",)) as image:
            image.load()
    except _PIL_ERRORS as error:
        raise BadImageError(
            "truncated" if _EOI not in bytes(content[-_TAIL_BYTES:]) else f"damaged ({error})"
        ) from None


def _is_rotated(content: bytes | memoryview) -> bool:
    try:
        with _open_image(content, ("JPEG",)) as image:
            return image.getexif().get(_ORIENTATION, 1) != 1
    except _PIL_ERRORS:  # the Exif data is damaged; the pixels may still be valid
        return False


@contextmanager
def _open_image(content: bytes | memoryview, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about palettes, sizes and Exif data; the result is still right
        with Image.open(io.BytesIO(content), formats=formats) as image:
            yield image
