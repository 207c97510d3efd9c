"""What an image is, and how PIL decodes it: the same for shards of any origin and for further validation sets."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES_BY_FORMAT = {
    "AVIF": (".avif", ".avifs"),
    "BLP": (".blp",),
    "BMP": (".bmp",),
    "CUR": (".cur",),
    "DCX": (".dcx",),
    "DDS": (".dds",),
    "DIB": (".dib",),
    "FLI": (".flc", ".fli"),
    "FTEX": (".ftc", ".ftu"),
    "GBR": (".gbr",),
    "GIF": (".gif",),
    "ICNS": (".icns",),
    "ICO": (".ico",),
    "IM": (".im",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "JPEG2000": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
    "MPO": (".mpo",),
    "MSP": (".msp",),
    "PCD": (".pcd",),
    "PCX": (".pcx",),
    "PIXAR": (".pxr",),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pfm", ".pgm", ".pnm", ".ppm"),
    "PSD": (".psd",),
    "QOI": (".qoi",),
    "SGI": (".bw", ".rgb", ".rgba", ".sgi"),
    "SUN": (".ras",),
    "TGA": (".icb", ".tga", ".vda", ".vst"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "XBM": (".xbm",),
    "XPM": (".xpm",),
}
"""PIL's formats of raster images. It reads several images of a few formats, of which the first counts. Left out are
documents, drawings that other programs render, measurements (FITS), and formats that PIL can only identify."""

IMAGE_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES_BY_FORMAT.values() for suffix in suffixes)

_SYSTEM_NAMES = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})

# 8 bits per channel, or fewer, which PIL scales. It reduces color images of 16 bits per channel to these itself.
_MODES_OF_8_BITS = frozenset(
    {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}
)  # fmt: skip

_MODES_OF_16_BITS = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF

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


class BadImageError(ValueError):
    """The bytes cannot be decoded as an image. The message says why in a few words."""


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image, and is not one that systems and editors add."""
    stem, dot, suffix = name.rpartition(".")
    return bool(stem) and f"{dot}{suffix.lower()}" in IMAGE_SUFFIXES and not is_system_file(name)


def is_system_file(name: str) -> bool:
    """Whether a file or folder is hidden, such as macOS's `._x.jpg` and `.ipynb_checkpoints`, or one of a system's."""
    return name.startswith(".") or name in _SYSTEM_NAMES


def decode_with_pil(content: bytes | memoryview) -> tuple[Image.Image, str]:
    """Returns the image in RGB, 8 bits per channel, and the name of its format. Alpha is dropped.

    Raises: BadImageError if the content is not an image, is damaged, or has values of unknown range.
    """
    if not len(content):
        raise BadImageError("empty")
    try:
        with open_image(content) as image:
            return _to_rgb(image), str(image.format)
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("not an image") from None
    except _PIL_ERRORS as error:
        raise BadImageError(f"cannot be decoded ({error})") from None


@contextmanager
def open_image(content: bytes | memoryview, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """Context manager that yields an image whose pixels are not decoded yet. PIL's errors are raised as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about palettes, sizes and Exif data; the result is still right
        with Image.open(io.BytesIO(content), formats=formats or _known_formats()) as image:
            yield image


@cache
def _known_formats() -> tuple[str, ...]:
    """Returns the formats to recognize, in PIL's order. PIL opens a JPEG with several images as MPO by itself."""
    Image.init()
    return tuple(name for name in Image.ID if name in SUFFIXES_BY_FORMAT)


def is_damaged(content: bytes | memoryview) -> str | None:
    """Returns why PIL, which rejects truncated files, cannot decode a JPEG, or None."""
    try:
        with open_image(content, ("JPEG",)) as image:
            image.load()
    except _PIL_ERRORS as error:
        return str(error)
    return None


def exif_orientation(content: bytes | memoryview) -> int:
    """Returns the Exif orientation of a JPEG; 1, upright, if it has none or the Exif data is damaged."""
    try:
        with open_image(content, ("JPEG",)) as image:
            return image.getexif().get(0x0112, 1)
    except _PIL_ERRORS:  # the pixels may still be valid
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts to RGB. PIL's own conversion clips values above 255 instead of scaling them."""
    if image.mode in _MODES_OF_8_BITS:
        return image.convert("RGB")
    if image.mode in _MODES_OF_16_BITS or (image.mode == "I" and image.format == "PPM"):  # there, PIL scales to 16 bits
        tags = getattr(image, "tag_v2", {})
        highest = 2 ** max(tags.get(_BITS_PER_SAMPLE, (16,))) - 1
        levels = np.asarray(image).astype(np.uint32)
        grey = ((levels * 255 + highest // 2) // highest).clip(max=255).astype(np.uint8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = 255 - grey
        return Image.fromarray(grey).convert("RGB")
    raise BadImageError(f"PIL's mode {image.mode} has no fixed range: convert the image to 8 bits per channel")
