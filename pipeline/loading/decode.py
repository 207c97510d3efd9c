"""Decodes images to the same pixels as PIL. Uses libjpeg-turbo directly for common JPEGs, and PIL for the rest."""

from __future__ import annotations

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from pipeline.base.images import decode_with_pil

_SIMPLEJPEG_COLORSPACES = frozenset({"YCbCr", "RGB", "Gray"})  # PIL converts CMYK to RGB in its own way


def decode_image(content: bytes) -> Tensor:
    """Decodes an image to RGB, uint8 (3, H, W), with the channels innermost in memory.

    The EXIF orientation of a JPEG is not applied, as in timm and torchvision.
    Raises: BadImageError, a ValueError, if the content is truncated, not an image, or has values of unknown range.
    """
    try:
        return _to_tensor(_decode_with_simplejpeg(content))
    except ValueError:
        return _to_tensor(np.array(decode_with_pil(content)[0]))


def _to_tensor(pixels_HWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _decode_with_simplejpeg(content: bytes) -> np.ndarray:
    """Raises ValueError for anything but a valid JPEG in color or grayscale."""
    colorspace = simplejpeg.decode_jpeg_header(content)[2]
    if colorspace not in _SIMPLEJPEG_COLORSPACES:
        raise ValueError(f"JPEG of {colorspace}")
    return simplejpeg.decode_jpeg(content, "RGB")
