"""JPEG to pixels, the pixels that PIL gives: by libjpeg-turbo's own decoder where it can, by PIL where it cannot."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

_FAST = frozenset({"YCbCr", "RGB", "Gray"})  # PIL turns the four inks of CMYK into RGB by a rule of its own


def decode(content: bytes) -> Tensor:
    """uint8 (3, H, W), RGB, the channels innermost in memory as decoders write them.

    A JPEG's EXIF orientation is left alone, as timm and torchvision leave it.
    Raises: ValueError for what is cut off or no image.
    """
    try:
        return _tensor(_decode_jpeg(content))
    except ValueError:
        return _tensor(_decode_any(content))


def _tensor(pixels_HWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _decode_jpeg(content: bytes) -> np.ndarray:
    """Raises: ValueError for anything but a sound JPEG of RGB or gray."""
    colorspace = simplejpeg.decode_jpeg_header(content)[2]
    if colorspace not in _FAST:
        raise ValueError(f"JPEG of {colorspace}")
    return simplejpeg.decode_jpeg(content, "RGB")


def _decode_any(content: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(reason) from None
