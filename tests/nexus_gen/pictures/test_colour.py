"""Embedded profiles: pixels come out as the colours that the photographer saw, and pictures in sRGB as they are."""

import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from nexus_gen.pictures.images import EncodedImage, open_image, open_size

# Colorants, the columns X Y Z of red, green and blue, relative to D50, as the profiles of that name have them.
SRGB = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
PROPHOTO = [[0.79767, 0.13519, 0.03134], [0.28804, 0.71188, 0.00009], [0.0, 0.0, 0.82491]]
ADOBE = [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
P3 = [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
COLOUR = (150, 120, 90)


def s15(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def profile(gamma: float, colorants: list[list[float]] | None = None, space: bytes = b"RGB ") -> bytes:
    """An ICC profile of version 2: three colorants and a gamma, or the gamma of greys alone."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + s15(0.9642, 1, 0.8249)}
    if colorants is None:
        tags[b"kTRC"] = curve
    else:
        for channel, name in enumerate("rgb"):
            tags[f"{name}XYZ".encode()] = b"XYZ " + bytes(4) + s15(*(row[channel] for row in colorants))
            tags[f"{name}TRC".encode()] = curve
    place, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    head = b"test" + struct.pack(">I", 0x02400000) + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    head = (head + bytes(28) + s15(0.9642, 1, 0.8249)).ljust(124, b"\0")
    return struct.pack(">I", place + len(body)) + head + struct.pack(">I", len(tags)) + table + body


def seen(colour: tuple[int, ...], gamma: float, colorants: list[list[float]]) -> np.ndarray:
    """A colour in sRGB by the formulas of the standards instead of by a colour engine."""
    linear = np.linalg.solve(SRGB, np.array(colorants) @ (np.array(colour) / 255) ** gamma).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def near(image: Image.Image, colour: object, x: int = 0) -> bool:
    return bool(np.abs(np.array(image.getpixel((x, 0))) - np.array(colour)).max() <= 2)


def stored(image: Image.Image, icc: bytes, image_format: str = "PNG", **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, image_format, icc_profile=icc, **options)
    source = EncodedImage("one", buffer.getvalue())
    opened = open_image(source)
    assert (opened.mode, opened.size) == ("RGB", open_size(source))
    return opened


@pytest.mark.parametrize(("colorants", "gamma"), [(ADOBE, 2.19921875), (P3, 2.2), (PROPHOTO, 1.8), (SRGB, 1.0)])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
def test_colours_are_those_of_the_profile(colorants: list[list[float]], gamma: float, image_format: str) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {"quality": 100} if image_format == "JPEG" else {}
    if image_format == "AVIF":
        options = {"quality": 100, "subsampling": "4:4:4"}
    opened = stored(Image.new("RGB", (8, 8), COLOUR), profile(gamma, colorants), image_format, **options)
    assert near(opened, seen(COLOUR, gamma, colorants))
    assert not opened.info, "a copy that is saved would say that its pixels are still in the old profile"


def test_a_camera_names_adobe_rgb_in_its_exif() -> None:
    image = Image.new("RGB", (8, 8), COLOUR)
    for index, expected in (("R03", seen(COLOUR, 2.19921875, ADOBE)), ("R98", COLOUR)):
        exif = Image.Exif()
        exif[0x0112] = 6
        exif[0x8769] = {0xA001: 65535, 0xA005: {1: index}}
        for image_format, options in (("JPEG", {"quality": 100}), ("PNG", {}), ("WEBP", {"lossless": True})):
            assert near(stored(image, b"", image_format, exif=exif, **options), expected), (index, image_format)
    exif[0x8769] = {0xA005: {1: "R03"}}
    p3 = stored(image, profile(2.2, P3), exif=exif)
    assert near(p3, seen(COLOUR, 2.2, P3))  # a profile counts more


def test_alpha_palettes_and_greys_follow_their_profile_before_white_shows_through() -> None:
    icc, expected = profile(2.19921875, ADOBE), seen(COLOUR, 2.19921875, ADOBE)
    half = Image.new("RGBA", (8, 8), (*COLOUR, 128))
    assert near(stored(half, icc), expected * 128 / 255 + 127)  # not: blended first, then converted
    assert near(stored(half, icc, "TIFF"), expected * 128 / 255 + 127)
    assert near(stored(half.quantize(2), icc), expected * 128 / 255 + 127)
    keyed = Image.new("RGB", (8, 8), COLOUR)
    keyed.putpixel((1, 0), (1, 2, 3))
    opened = stored(keyed, icc, transparency=(1, 2, 3))
    assert near(opened, expected) and opened.getpixel((1, 0)) == (255, 255, 255)
    grey, dark = profile(1.0, space=b"GRAY"), seen((60,) * 3, 1.0, SRGB)  # linear light
    assert near(stored(Image.new("L", (8, 8), 60), grey), dark)
    assert near(stored(Image.new("LA", (8, 8), (60, 128)), grey), dark * 128 / 255 + 127)
    assert near(stored(Image.new("L", (8, 8), 60), profile(1.0, SRGB)), dark)  # of three channels, for one
    deep = Image.fromarray(np.array([[300, 60 * 257] + [65535] * 6], dtype=np.uint16))
    opened = stored(deep, grey)
    assert near(opened, dark, 1) and near(opened, seen((300 / 257,) * 3, 1.0, SRGB), 0)  # not in steps of 8 bits
    opened = stored(deep, grey, transparency=60 * 257)
    assert opened.getpixel((1, 0)) == (255, 255, 255) and near(opened, seen((300 / 257,) * 3, 1.0, SRGB), 0)


def test_srgb_in_any_writing_leaves_every_pixel_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    built = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for image in (Image.fromarray(pixels[..., :3]), Image.fromarray(pixels), Image.fromarray(pixels[..., 0])):
        plain = np.asarray(stored(image, b""))
        assert np.array_equal(np.asarray(stored(image, built)), plain)
    assert not caplog.records
    opened = stored(Image.fromarray(pixels[..., :3]), profile(2.2, SRGB))  # nearly sRGB: its dark tones differ
    assert not np.array_equal(np.asarray(opened), pixels[..., :3])


def test_a_profile_that_cannot_be_used_is_reported_once_and_the_picture_opens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    image, damaged = Image.new("RGB", (8, 8), COLOUR), profile(2.2, ADOBE)[:150]
    unusable = (damaged, b"noise", profile(1.5, space=b"GRAY"), profile(2.3, ADOBE).replace(b"RGB ", b"6CLR"))
    for number, icc in enumerate(unusable, start=1):
        for _ in range(2):
            assert stored(image, icc).getpixel((0, 0)) == COLOUR
        assert len(caplog.records) == number, caplog.text
    assert "picture one: its colour profile is not used (it is for GRAY and the pixels are RGB)" in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_inks_look_as_their_profile_says_or_plainly_where_it_is_wrong(tmp_path: Path) -> None:
    inks = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    plain = inks.convert("RGB").getpixel((0, 0))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # for three channels, not for inks
    for icc in (b"noise of inks", srgb):
        assert stored(inks, icc, "TIFF").getpixel((0, 0)) == plain


def png(width: int, rows: list[bytes], depth: int, kind: int, clear: bytes) -> EncodedImage:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)) + chunk(b"tRNS", clear)
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return EncodedImage("a.png", b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("depth", "kind", "samples", "clear"),
    [
        (1, 0, [0, 1], [0]),
        (1, 0, [0, 1], [1]),
        (2, 0, [0, 1, 2, 3], [2]),
        (4, 0, [5, 15, 0, 7], [5]),
        (8, 0, [5, 15, 0, 255], [5]),
        (16, 0, [30000, 30001, 0, 65535], [30000]),
        (16, 2, [51400, 25700, 123, 0, 25700, 123], [51400, 25700, 123]),
        (8, 2, [200, 100, 3, 0, 100, 3], [200, 100, 3]),
    ],
)
def test_the_transparent_colour_of_a_png_of_any_depth(
    depth: int, kind: int, samples: list[int], clear: list[int]
) -> None:
    bits = "".join(f"{value:0{depth}b}" for value in samples)
    bits = bits.ljust(-(-len(bits) // 8) * 8, "0")
    channels = 3 if kind == 2 else 1
    pixels = [samples[first : first + channels] for first in range(0, len(samples), channels)]
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    opened = open_image(png(len(pixels), [row], depth, kind, struct.pack(f">{channels}H", *clear)))
    for x, pixel in enumerate(pixels):
        shown = [round(value * 255 / (2**depth - 1)) for value in pixel]
        assert near(opened, [255] * 3 if pixel == clear else shown * (3 // channels), x), (x, opened.getpixel((x, 0)))


def test_sizes_and_orientations_agree_wherever_they_are_written(tmp_path: Path) -> None:
    image = Image.new("RGB", (12, 8), (200, 30, 30))
    image.paste((30, 30, 200), (6, 0, 12, 8))
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="{}"/>'
    for orientation in range(1, 10):  # 9 is none
        exif = Image.Exif()
        exif[0x0112] = orientation
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.format(orientation))
        by_xmp = {"xmp": xmp.format(orientation).encode()}
        ways = {
            "exif.png": {"exif": exif},
            "exif.webp": {"exif": exif, "lossless": True},
            "exif.avif": {"exif": exif, "quality": 100},
            "tag.tif": {"tiffinfo": {274: orientation}},
            "tag-lzw.tif": {"tiffinfo": {274: orientation}, "compression": "tiff_lzw"},
            "both.tif": {"tiffinfo": {274: orientation, 700: by_xmp["xmp"]}},
            "xmp.png": {"pnginfo": text},
            "xmp.webp": {**by_xmp, "lossless": True},
            "xmp.jpg": {**by_xmp, "quality": 100, "subsampling": 0},
            "xmp.tif": {"tiffinfo": {700: by_xmp["xmp"]}},
        }
        if orientation == 9:  # libtiff refuses to write it
            del ways["tag-lzw.tif"]
        for name, options in ways.items():
            image.save(tmp_path / name, **options)
            opened = open_image(tmp_path / name)
            expected = (8, 12) if orientation in (5, 6, 7, 8) else (12, 8)
            assert opened.size == open_size(tmp_path / name) == expected, (name, orientation)
            red_is_first = orientation in (1, 4, 5, 6, 9)
            assert (opened.getpixel((1, 1))[0] > 100) == red_is_first, (name, orientation)  # type: ignore[index]


def test_an_icon_whose_directory_is_wrong_about_its_size(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), COLOUR).save(tmp_path / "a.ico", sizes=[(64, 64)])
    data = bytearray((tmp_path / "a.ico").read_bytes())
    data[6:8] = bytes([32, 16])
    (tmp_path / "a.ico").write_bytes(data)
    with pytest.warns(UserWarning, match="expected size"):
        assert open_image(tmp_path / "a.ico").size == open_size(tmp_path / "a.ico") == (64, 64)
