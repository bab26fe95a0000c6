"""Pixels of any mode and colour profile as 8-bit sRGB over white. PIL and NumPy only."""

import io
import logging
import struct
from functools import cache, lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms

log = logging.getLogger(__name__)

DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # grey in 16 bits
WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa")
SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}  # colour space of a profile -> mode of its pixels
SRGB = ImageCms.createProfile("sRGB")
ROUNDING = 2  # of 255: profiles of sRGB differ by so much in how they round its curve
LATTICE = 17  # colours per axis that a profile is compared with sRGB at
# From a PNG's samples to the 8 bits that PIL makes of them; it leaves the transparent colour as the file has it.
FROM_DEPTH = {"L;2": lambda value: value * 85, "L;4": lambda value: value * 17, "RGB;16B": lambda value: value >> 8}
_reported: set[int] = set()  # hashes of profiles that were reported as unusable


def scale_transparent_colour(image: Image.Image) -> None:
    """Bring the colour that a PNG names as transparent to the depth of its pixels; to be called before they load."""
    colour = image.info.get("transparency")
    scale = FROM_DEPTH.get(image.tile[0].args) if image.format == "PNG" and image.tile else None  # type: ignore[attr-defined]
    if scale is not None and colour is not None:
        image.info["transparency"] = tuple(map(scale, colour)) if isinstance(colour, tuple) else scale(colour)


def to_rgb(image: Image.Image, name: object = "a picture") -> Image.Image:
    """Any mode to sRGB: colours as the embedded profile says, transparent parts over white, in that order.

    name: what a notice calls the picture when its profile cannot be used; its numbers are then taken for sRGB.
    Raises ValueError for floating-point pixels: none is white.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed white; save it with 8 or 16 bits")
    colours, alpha = _without_alpha(image)
    profile = image.info.get("icc_profile") or (_adobe_rgb() if _says_adobe_rgb(image) else None)
    pixels = _converted(colours, profile, name) if profile else None
    if pixels is None:
        pixels = _plain(colours)
    if alpha is not None:
        pixels.putalpha(alpha)
        pixels = Image.alpha_composite(Image.new("RGBA", pixels.size, (255, 255, 255, 255)), pixels).convert("RGB")
    pixels.info = {}  # a copy that is saved must not say that these pixels are in the old profile
    return pixels


def _says_adobe_rgb(image: Image.Image) -> bool:
    """Whether a camera says so in its EXIF, as DCF has it, where others embed a profile."""
    if "exif" not in image.info:
        return False
    try:
        return str(image.getexif().get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)).startswith("R03")
    except Exception:  # whatever parsing runs into; a damaged note of the camera is none
        return False


@cache
def _adobe_rgb() -> bytes:
    """An ICC profile of Adobe RGB (1998): its colorants relative to D50, and its gamma.

    Source: ICC.1:2001-04 for the layout, Adobe RGB (1998) Color Image Encoding, section 4.3, for the numbers.
    """

    def xyz(*values: float) -> bytes:
        return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))

    curve = b"curv" + bytes(4) + struct.pack(">IHH", 1, 563, 0)  # 563 / 256 = 2.2
    tags = {
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": xyz(0.14919, 0.06322, 0.74457),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, body, begin = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", begin + len(body), len(data))
        body += data
    kind = b"lcms" + struct.pack(">I", 0x02400000) + b"mntrRGB XYZ " + bytes(12) + b"acsp"
    head = (kind + bytes(28) + xyz(0.9642, 1.0, 0.8249)[8:]).ljust(124, b"\0")
    return struct.pack(">I", begin + len(body)) + head + struct.pack(">I", len(tags)) + table + body


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours in a mode that profiles know, and how opaque they are; None where all are."""
    if image.mode in DEEP:
        values = np.asarray(image).clip(0, 65535).astype(np.uint16)
        clear = image.info.get("transparency")
        alpha = None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        return Image.fromarray(values), alpha
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        blended = image.convert("RGBA")
        return image.convert("L") if image.mode in ("1", "L", "LA") else blended.convert("RGB"), blended.getchannel("A")
    return image.convert({"1": "L", "P": "RGB"}.get(image.mode, image.mode)), None


def _plain(colours: Image.Image) -> Image.Image:
    """Without a profile: numbers are sRGB's, inks mix by PIL's formula."""
    if colours.mode == "I;16":
        colours = Image.fromarray((np.asarray(colours, dtype=np.float32) / 65535 * 255).round().astype(np.uint8))
    return colours.convert("RGB")


def _converted(colours: Image.Image, profile: bytes, name: object) -> Image.Image | None:
    """By the profile; None where that changes nothing or is impossible, which is reported once for each profile."""
    transform, mode, problem = _transform(profile, colours.mode)
    if problem and hash(profile) not in _reported:
        _reported.add(hash(profile))
        log.warning("%s: its colour profile is not used (%s); its colours are taken for sRGB", name, problem)
    if transform is None:
        return None
    return transform.apply(colours if colours.mode == mode else _plain(colours))


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str, str]:
    """From pixels of a mode by their profile to sRGB: what converts, from which mode, and why nothing does.

    Nothing converts, and there is no problem, where the profile is one of sRGB: pixels then stay as they are.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        meant = SPACES.get(space)
        if meant == "RGB" and mode not in ("CMYK", "LAB"):
            mode = "RGB"
        elif meant != mode and not (meant == "L" and mode == "I;16"):
            return None, mode, f"it is for {space} and the pixels are {mode}"
        if meant in ("L", "RGB") and any(_is_srgb(source, meant, intent) for intent in ImageCms.Intent):
            return None, mode, ""
        # Optimised, greys in linear light would come out of a coarse table: 7 instead of 14 near black.
        flags = ImageCms.Flags.NOOPTIMIZE if meant == "L" else ImageCms.Flags.NONE
        return ImageCms.buildTransform(source, SRGB, mode, "RGB", flags=flags), mode, ""
    except (ImageCms.PyCMSError, OSError) as error:
        return None, mode, " ".join(str(error).split())


def _is_srgb(profile: ImageCms.ImageCmsProfile, mode: str, intent: ImageCms.Intent) -> bool:
    """Whether it leaves colours where they are, but for rounding."""
    if mode == "L":
        colours = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    else:
        axis = np.linspace(0, 255, LATTICE).round().astype(np.uint8)
        lattice = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(1, -1, 3)
        greys = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, axis=-1)
        colours = Image.fromarray(np.concatenate([lattice, greys], axis=1))
    seen = ImageCms.buildTransform(profile, SRGB, mode, "RGB", intent).apply(colours)
    moved = np.asarray(seen, dtype=np.int16) - np.asarray(colours.convert("RGB"), dtype=np.int16)
    return bool(np.abs(moved).max() <= ROUNDING)
