"""Inspection finds issues without decoding, and agrees with a full decode."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.packing import inspection
from pipeline.packing.inspection import BadImageError, ImageIssues
from tests.packing import layouts


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_color_jpeg_has_no_issues():
    assert inspection.inspect_image(layouts.jpeg(0)) is None
    assert inspection.inspect_image(memoryview(layouts.jpeg(0))) is None
    assert inspection.inspect_image(encoded(layouts.pixels(1), "JPEG", progressive=True, quality=50)) is None


@pytest.mark.parametrize(
    ("kind", "issue"),
    [
        ("grayscale", "grayscale"),
        ("cmyk", "cmyk"),
        ("rotated", "exif-rotated"),
    ],
)
def test_jpegs_with_issues_are_kept_unchanged(kind, issue):
    assert inspection.inspect_image(layouts.issue_image(kind)) == ImageIssues((issue,), None)


def test_a_jpeg_can_have_two_issues():
    exif = Image.Exif()
    exif[0x0112] = 3
    content = encoded(layouts.pixels(1).convert("L"), "JPEG", exif=exif)
    assert inspection.inspect_image(content) == ImageIssues(("grayscale", "exif-rotated"), None)


def test_neutral_exif_orientation_is_no_issue():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 1, "a maker"
    content = encoded(layouts.pixels(1), "JPEG", exif=exif)
    assert b"Exif\0\0" in content
    assert inspection.inspect_image(content) is None


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_other_formats_become_the_jpeg_of_their_pixels(kind, mode):
    content = encoded(layouts.pixels(2).convert(mode), kind)
    result = inspection.inspect_image(content)
    assert result and result.replacement
    assert result.issues == (kind.lower(),)
    with Image.open(io.BytesIO(content)) as before, Image.open(io.BytesIO(result.replacement)) as after:
        assert (after.format, after.mode, after.size) == ("JPEG", "RGB", before.size)
        difference = np.asarray(before.convert("RGB"), float) - np.asarray(after)
    assert np.abs(difference).mean() < 6  # a GIF is dithered


def test_a_transparent_palette_raises_no_warning():
    content = encoded(layouts.pixels(3).convert("P"), "PNG", transparency=b"\x00\x80\xff")
    result = inspection.inspect_image(content)
    assert result and result.issues == ("png",)


@pytest.mark.parametrize(("kind", "reason"), [("empty", "empty"), ("truncated", "truncated"), ("text", "not an image")])
def test_bad_images_get_the_right_reason(kind, reason):
    with pytest.raises(BadImageError, match=f"^{reason}$"):
        inspection.inspect_image(layouts.issue_image(kind))


@given(share=st.floats(0.0, 1.0), seed=st.integers(0, 20))
def test_a_jpeg_that_is_cut_anywhere_is_bad(share, seed):
    content = layouts.jpeg(seed)
    with pytest.raises(BadImageError):
        inspection.inspect_image(content[: int(share * (len(content) - 2))])


def test_padding_after_the_end_is_no_damage():
    for padding in (3, 5000):
        assert inspection.inspect_image(layouts.jpeg(0) + bytes(padding)) is None


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP"])
def test_other_formats_that_are_cut_are_bad(kind):
    content = encoded(layouts.pixels(4), kind)
    with pytest.raises(BadImageError):
        inspection.inspect_image(content[: len(content) // 2])


def test_an_image_larger_than_a_jpeg_may_be_is_refused():
    content = io.BytesIO()
    Image.new("L", (1, 65536)).save(content, "PNG")
    with pytest.raises(BadImageError, match="1 x 65536 pixels, and a JPEG has at most 65535"):
        inspection.inspect_image(content.getvalue())


@given(kind=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]), seed=st.integers(0, 10**6))
def test_altered_bytes_make_a_bad_image_or_none_but_no_other_error(kind, seed):
    rng = np.random.default_rng(seed)
    content = bytearray(encoded(layouts.pixels(5), kind))
    for position in rng.integers(len(content), size=8):
        content[position] = rng.integers(256)
    try:
        result = inspection.inspect_image(bytes(content))
    except BadImageError as error:
        result = None
        assert str(error)
    assert result is None or isinstance(result, inspection.ImageIssues)
