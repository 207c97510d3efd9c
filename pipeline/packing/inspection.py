"""Inspects the bytes of an image. An image without issues is not decoded.

ImageNet's .JPEG files include a PNG, CMYK JPEGs, thousands of grayscale JPEGs, and images with an EXIF rotation. Copies
of ImageNet also contain truncated and empty files.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import simplejpeg

from pipeline.base.images import BadImageError, decode_with_pil, exif_orientation, is_damaged

QUALITY = 95
"""JPEG quality for images that are converted from another format."""

KEPT, ENCODED, LEFT_OUT = "kept as it is", "encoded as JPEG", "left out"

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"

_TAIL_BYTES = 64  # a complete JPEG has its end marker in the last bytes; some writers add padding

_HEAD_BYTES = 4096  # Exif data starts in the first bytes: only a JFIF segment can precede it

_COLORSPACE_ISSUES = {"Gray": "grayscale", "CMYK": "cmyk", "YCCK": "cmyk"}

_MAX_JPEG_SIDE = 65535  # pixels


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
    if b"Exif\0\0" in bytes(content[:_HEAD_BYTES]) and exif_orientation(content) != 1:
        issues.append("exif-rotated")
    return ImageIssues(tuple(issues), None) if issues else None


def _reencode(content: bytes | memoryview) -> ImageIssues:
    """Converts an image of another format to an RGB JPEG."""
    image, image_format = decode_with_pil(content)
    if max(image.size) > _MAX_JPEG_SIDE:
        raise BadImageError(f"{image.width} x {image.height} pixels, and a JPEG has at most {_MAX_JPEG_SIDE} a side")
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return ImageIssues((image_format.lower(),), file.getvalue())


def _check_decodable(content: bytes | memoryview) -> None:
    """Decodes a suspicious JPEG. Raises: BadImageError."""
    if damage := is_damaged(content):
        raise BadImageError("truncated" if _EOI not in bytes(content[-_TAIL_BYTES:]) else f"damaged ({damage})")
