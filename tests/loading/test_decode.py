"""Decoded pixels match PIL, and invalid images raise an error."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.loading.decode import decode_image
from tests.packing import layouts


def encoded(mode: str, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    layouts.pixels(3).convert(mode).save(file, format, **options)
    return file.getvalue()


IMAGES = {kind: layouts.issue_image(kind) for kind in layouts.ISSUES} | {
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
def test_pixels_match_pil(kind):
    reference = np.asarray(Image.open(io.BytesIO(IMAGES[kind])).convert("RGB"))
    assert np.array_equal(decode_image(IMAGES[kind]).permute(1, 2, 0).numpy(), reference)


@pytest.mark.parametrize("kind", layouts.BAD_IMAGES)
def test_truncated_and_other_files_are_refused(kind):
    with pytest.raises(ValueError, match={"truncated": "truncated", "empty": "^empty$"}.get(kind, "^not an image$")):
        decode_image(layouts.issue_image(kind))
