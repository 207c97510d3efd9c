"""What images are: cheaply told, and the same as a full decode would tell."""

from __future__ import annotations

import io

import layouts
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import jpeg
from pipeline.jpeg import BadImage, Odd


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_colour_jpeg_is_nothing_odd():
    assert jpeg.inspect(layouts.jpeg(0)) is None
    assert jpeg.inspect(memoryview(layouts.jpeg(0))) is None
    assert jpeg.inspect(encoded(layouts.pixels(1), "JPEG", progressive=True, quality=50)) is None


@pytest.mark.parametrize(("kind", "oddity"), [
    ("grayscale", "grayscale"), ("cmyk", "cmyk"), ("rotated", "exif-rotated"),
])
def test_odd_jpegs_are_kept_as_they_are(kind, oddity):
    assert jpeg.inspect(layouts.odd_image(kind)) == Odd((oddity,), None)


def test_a_jpeg_can_be_odd_in_two_ways():
    exif = Image.Exif()
    exif[0x0112] = 3
    content = encoded(layouts.pixels(1).convert("L"), "JPEG", exif=exif)
    assert jpeg.inspect(content) == Odd(("grayscale", "exif-rotated"), None)


def test_exif_data_that_turns_nothing_is_nothing_odd():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 1, "a maker"
    content = encoded(layouts.pixels(1), "JPEG", exif=exif)
    assert b"Exif\0\0" in content
    assert jpeg.inspect(content) is None


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_other_formats_become_the_jpeg_of_their_pixels(kind, mode):
    content = encoded(layouts.pixels(2).convert(mode), kind)
    odd = jpeg.inspect(content)
    assert odd and odd.jpeg
    assert odd.oddities == (kind.lower(),)
    with Image.open(io.BytesIO(content)) as before, Image.open(io.BytesIO(odd.jpeg)) as after:
        assert (after.format, after.mode, after.size) == ("JPEG", "RGB", before.size)
        difference = np.asarray(before.convert("RGB"), float) - np.asarray(after)
    assert np.abs(difference).mean() < 6  # a GIF is dithered


def test_a_palette_with_transparency_warns_nobody():
    content = encoded(layouts.pixels(3).convert("P"), "PNG", transparency=b"\x00\x80\xff")
    odd = jpeg.inspect(content)
    assert odd and odd.oddities == ("png",)


@pytest.mark.parametrize(("kind", "told"), [("empty", "empty"), ("truncated", "truncated"), ("text", "not an image")])
def test_bad_images_are_told_apart(kind, told):
    with pytest.raises(BadImage, match=f"^{told}$"):
        jpeg.inspect(layouts.odd_image(kind))


@given(share=st.floats(0.0, 1.0), seed=st.integers(0, 20))
def test_a_jpeg_that_is_cut_anywhere_is_bad(share, seed):
    content = layouts.jpeg(seed)
    with pytest.raises(BadImage):
        jpeg.inspect(content[: int(share * (len(content) - 2))])


def test_padding_after_the_end_is_no_damage():
    for padding in (3, 5000):
        assert jpeg.inspect(layouts.jpeg(0) + bytes(padding)) is None


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP"])
def test_other_formats_that_are_cut_are_bad(kind):
    content = encoded(layouts.pixels(4), kind)
    with pytest.raises(BadImage):
        jpeg.inspect(content[: len(content) // 2])


@given(kind=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]), seed=st.integers(0, 10**6))
def test_altered_bytes_make_a_bad_image_or_none_but_no_other_error(kind, seed):
    rng = np.random.default_rng(seed)
    content = bytearray(encoded(layouts.pixels(5), kind))
    for place in rng.integers(len(content), size=8):
        content[place] = rng.integers(256)
    try:
        found = jpeg.inspect(bytes(content))
    except BadImage as error:
        found = None
        assert str(error)
    assert found is None or isinstance(found, jpeg.Odd)
