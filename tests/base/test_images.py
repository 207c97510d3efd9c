"""Images of every kind that PIL reads have the right brightness, or are named as unreadable."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.base import images
from pipeline.base.images import BadImageError
from pipeline.loading.decode import decode_image
from pipeline.packing import inspection

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)  # 0 to 65535; of 8 bits, 0 to 255


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(content: bytes) -> np.ndarray:
    """(H, W, 3) float, as training and further validation sets read it; sharding stores the same, as a JPEG."""
    pixels = decode_image(content).permute(1, 2, 0).numpy().astype(float)
    found = inspection.inspect_image(content)
    assert found and found.replacement
    stored = decode_image(found.replacement).permute(1, 2, 0).numpy()
    assert abs(stored.mean() - pixels.mean()) < 0.5
    return pixels


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel, (H, W) or (H, W, C), which PIL does not write."""
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.shape[2] if pixels.ndim == 3 else 1]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, color_type, 0, 0, 0)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_of_12_bits(levels: list[int]) -> bytes:
    """A little-endian TIFF of one row of an even number of 12-bit grey levels, which PIL does not write."""
    bits = "".join(f"{level:012b}" for level in levels)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = [(256, len(levels)), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(data))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)


@pytest.mark.parametrize(
    "content",
    [
        png_of_16_bits(RAMP),
        png_of_16_bits(np.stack([RAMP] * 3, -1)),
        png_of_16_bits(np.stack([RAMP] * 2, -1)),
        encoded(Image.fromarray(RAMP), "PNG"),
        encoded(Image.fromarray(RAMP), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
        encoded(Image.fromarray(RAMP), "JPEG2000"),
        b"P5 256 256 65535\n" + RAMP.astype(">u2").tobytes(),
        b"P5 256 256 1023\n" + (RAMP // 64).astype(">u2").tobytes(),
        b"P2 256 256 65535\n" + " ".join(map(str, RAMP.flatten())).encode(),
        b"P6 256 256 65535\n" + np.stack([RAMP] * 3, -1).astype(">u2").tobytes(),
    ],
    ids=["PNG", "PNG RGB", "PNG LA", "PNG by PIL", "TIFF", "big-endian TIFF", "JPEG 2000", "PGM", "PGM of 10 bits",
         "plain PGM", "PPM"],
)  # fmt: skip
def test_a_ramp_of_more_than_8_bits_has_the_mean_of_one_of_8_bits(content):
    pixels = decoded(content)
    assert pixels.mean() == pytest.approx(127.5, abs=0.6)
    assert np.abs(pixels - RAMP[..., None] / 257).max() <= 1.5
    assert (pixels[0, 0] == 0).all() and (pixels[-1, -1] == 255).all()


def test_levels_of_12_bits_are_scaled_by_their_own_range():
    assert decoded(tiff_of_12_bits([0, 1024, 2048, 4095]))[0, :, 0].tolist() == [0, 64, 128, 255]


def test_white_may_be_zero():
    pixels = decoded(encoded(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0}))
    assert (pixels[0, 0] == 255).all() and (pixels[-1, -1] == 0).all()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("PA", "TIFF"), ("RGB", "PNG"), ("RGBA", "PNG"),
     ("RGBX", "TIFF"), ("CMYK", "TIFF"), ("RGB", "AVIF"), ("RGB", "QOI"), ("RGB", "SGI"),
     ("RGB", "TGA"), ("RGB", "PCX"), ("1", "XBM"), ("RGB", "DDS"), ("RGB", "ICO"), ("RGB", "DIB"), ("L", "IM"),
     ("1", "MSP"), ("RGBA", "WEBP")],
)  # fmt: skip
def test_black_grey_and_white_of_8_bits_stay_so(mode, kind):
    levels = [0, 255] if mode == "1" else [0, 128, 255]
    for level in levels:
        grey = Image.new("L", (16, 16), level).convert("RGB")
        image = grey.quantize().convert(mode) if mode in ("P", "PA") else grey.convert(mode)
        content = encoded(image, kind)
        assert np.abs(decoded(content) - level).max() <= 3


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_modes_without_a_fixed_range_are_named(mode):
    content = encoded(Image.new(mode, (8, 8)), "TIFF")
    for read in (decode_image, inspection.inspect_image):
        with pytest.raises(BadImageError, match=f"PIL's mode {mode} has no fixed range: convert the image to 8 bits"):
            read(content)


def test_every_mode_of_pil_is_scaled_or_named():
    handled = images._MODES_OF_8_BITS | images._MODES_OF_16_BITS
    assert set(Image.MODES) - handled == {"I", "F", "LAB"}  # `I` of a PGM is scaled
    assert handled <= set(Image.MODES)


def test_every_raster_format_of_pil_is_an_image():
    Image.init()
    known = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind in (*Image.OPEN, "MPO")}
    left_out = {kind for suffix, kind in known.items() if suffix not in images.IMAGE_SUFFIXES}
    assert left_out == {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
    for kind, suffixes in images.SUFFIXES_BY_FORMAT.items():
        assert all(known[suffix] == kind for suffix in suffixes)


@pytest.mark.parametrize("name", ["x.jfif", "x.avif", "x.JPE", "x.pgm", "x.y.JPEG", "ü.webp", "x.JP2"])
def test_images(name):
    assert images.is_image(name)


@pytest.mark.parametrize("name", ["._x.jpg", ".jpg", ".x.png", "x", "x.txt", "x.pdf", "Thumbs.db", "x.jpg.part"])
def test_no_images(name):
    assert not images.is_image(name)
