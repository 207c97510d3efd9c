"""Decoding: PIL's pixels of whatever is an image, and an error for what is not."""

from __future__ import annotations

import io

import layouts
import numpy as np
import pytest
from PIL import Image

from pipeline.decode import decode


def encoded(mode: str, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    layouts.pixels(3).convert(mode).save(file, format, **options)
    return file.getvalue()


IMAGES = {kind: layouts.odd_image(kind) for kind in layouts.ODD} | {
    "JPEG": layouts.jpeg(3),
    "progressive": encoded("RGB", "JPEG", progressive=True),
    "4:4:4": encoded("RGB", "JPEG", subsampling="4:4:4"),
    "4:2:2": encoded("RGB", "JPEG", subsampling="4:2:2"),
    "RGB kept": encoded("RGB", "JPEG", keep_rgb=True),
    "palette": encoded("P", "PNG"),
    "GIF": encoded("RGB", "GIF"),
    "bytes behind it": layouts.jpeg(3) + b"more",
}


@pytest.mark.parametrize("kind", IMAGES)
def test_pixels_are_pils(kind):
    reference = np.asarray(Image.open(io.BytesIO(IMAGES[kind])).convert("RGB"))
    assert np.array_equal(decode(IMAGES[kind]).permute(1, 2, 0).numpy(), reference)


@pytest.mark.parametrize("kind", layouts.BAD)
def test_what_is_no_whole_image_is_refused(kind):
    with pytest.raises(ValueError, match="truncated" if kind == "truncated" else "^not an image$"):
        decode(layouts.odd_image(kind))
