"""Opening and resizing pictures: one home for the geometry that embeddings and pixels share. PIL and NumPy only."""

import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from nexus_gen.pictures.colour import scale_transparent_colour, to_rgb
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import MERGE_SIZE, RELEASED_TARGET_TOKENS, target_grids

MAX_ASPECT = 200  # Qwen's processor refuses pictures that are longer and narrower


# What may be opened. Left out are formats that PIL hands to other programs (EPS) or that are no pictures for people.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "ICO", "HEIF")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # behind `ftyp`, of phones
# `open_image` compares sizes itself: filters that it set around each call would race between threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of a picture's file, held by the row that it came with. name: what errors call it."""

    name: str
    data: bytes = field(repr=False)

    def read(self) -> bytes:
        return self.data

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ImageMember:
    """A picture's file inside an uncompressed tar; its bytes are read when it is opened."""

    name: str
    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return self.name


StoredImage = Path | EncodedImage | ImageMember  # what rows hold


def read_image_bytes(source: StoredImage) -> bytes:
    """The file's bytes as they are stored, for hashing; UserError when they cannot be read."""
    try:
        return source.read_bytes() if isinstance(source, Path) else source.read()
    except OSError as error:
        raise UserError(f"picture {source} cannot be read ({error.strerror}); check the path") from error


def open_image(source: str | os.PathLike[str] | EncodedImage | ImageMember) -> Image.Image:
    """A picture in sRGB as it is meant to be seen: turned as its EXIF, XMP or TIFF tag says, in the colours of its
    profile, over white where it is transparent, 16 bits scaled to 8, the first frame of an animation.

    Raises UserError naming the file when it is missing, no picture, cut short, or a decompression bomb.
    """
    with _opened(source) as image:
        image.seek(0)
        scale_transparent_colour(image)
        image.load()
        return to_rgb(ImageOps.exif_transpose(image), f"picture {source}")


def open_size(source: str | os.PathLike[str] | EncodedImage | ImageMember) -> tuple[int, int]:
    """(width, height) that `open_image` would give, read from the header where that is sure; UserError as there."""
    with _opened(source) as image:
        if image.format == "ICO":  # its directory may be wrong about the picture, which alone counts
            image.load()
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # PIL has turned the size by its tag, but not by its XMP
            width, height = (image.tag_v2[tag] for tag in (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH))
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


@contextmanager
def _opened(source: str | os.PathLike[str] | EncodedImage | ImageMember) -> Iterator[Image.Image]:
    """A picture with its header read; whatever goes wrong with it inside the `with` becomes a UserError."""
    file: Any = None
    try:
        file = io.BytesIO(source.read()) if isinstance(source, EncodedImage | ImageMember) else source
        with Image.open(file, formats=_formats()) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {limit}")
            yield image
    except FileNotFoundError as error:
        raise UserError(f"picture {source} does not exist; check the path") from error
    except Exception as error:  # decoders raise whatever their parsing ran into: struct.error, RuntimeError, KeyError
        remedy = "it is HEIC: `pip install pillow-heif` reads it" if _is_heif(error, file) else "replace it"
        raise UserError(f"picture {source} cannot be read ({_reason(error)}); {remedy}") from error


@cache
def _formats() -> list[str]:
    """FORMATS without those whose decoder is not installed; PIL refuses their names."""
    Image.init()
    with suppress(ImportError):  # an extra
        import pillow_heif

        pillow_heif.register_heif_opener()
    return [name for name in FORMATS if name in Image.OPEN]


def _is_heif(error: Exception, file: Any) -> bool:
    """Whether a picture that nothing can read is HEIC or HEIF."""
    if not isinstance(error, Image.UnidentifiedImageError) or "HEIF" in _formats():
        return False
    if isinstance(file, io.BytesIO):
        head = file.getvalue()[:12]
    else:
        with open(file, "rb") as opened:
            head = opened.read(12)
    return head[4:8] == b"ftyp" and head[8:] in HEIF_BRANDS


def _reason(error: Exception) -> str:
    """One line; PIL's own sentence holds the address of a buffer where the picture came as bytes."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"it is none of {', '.join(_formats())}"
    return " ".join(str(error).split()) or type(error).__name__


def cover_crop(image: Image.Image, width: int, height: int | None = None) -> Image.Image:
    """Scale until the size is covered (bilinear), then cut the centre out: width x height, aspect kept.

    height: the width unless given.
    """
    return ImageOps.fit(image, (width, height or width), Image.Resampling.BILINEAR)


def squash(image: Image.Image, size: int) -> Image.Image:
    """Scale both sides to `size` (bicubic, PIL's default), whatever the aspect."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def context_size(width: int, height: int, patch_size: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) that the model looks at a picture in: sides multiples of a merged patch, aspect about kept.

    At most max_pixels, unless a side is a single merged patch, and at least four merged patches. Raises ValueError for
    a picture of which one side is more than 200 times the other.
    Source: `smart_resize` of transformers' Qwen2-VL image processor, which a test holds it equal to.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"a picture of {width} x {height} is more than {MAX_ASPECT} times as long as it is wide; crop it"
        )
    unit = MERGE_SIZE * patch_size
    sides = [round(side / unit) * unit for side in (width, height)]
    if math.prod(sides) > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        sides = [max(unit, math.floor(side / shrink / unit) * unit) for side in (width, height)]
    elif math.prod(sides) < (smallest := 4 * unit**2):
        grow = math.sqrt(smallest / (width * height))
        sides = [math.ceil(side * grow / unit) * unit for side in (width, height)]
    return sides[0], sides[1]


@dataclass(frozen=True)
class PictureSizing:
    """In which size the model sees the pictures of a conversation; sizes are (width, height) in pixels.

    Target pictures are squares of num_target_tokens. dynamic_targets: they take the one of `target_grids` whose aspect
    is nearest to theirs. Context pictures keep their aspect within max_pixels. consistent_edit_scale: those before a
    target picture take the size of the next one.
    """

    patch_size: int
    max_pixels: int
    dynamic_targets: bool = False
    consistent_edit_scale: bool = False
    num_target_tokens: int = RELEASED_TARGET_TOKENS

    def target_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size that a target picture of this size gets."""
        grids = target_grids(self.num_target_tokens)[: None if self.dynamic_targets else 1]
        aspect = math.log(size[0] / size[1])
        rows, columns = min(grids, key=lambda grid: abs(math.log(grid[1] / grid[0]) - aspect))
        unit = MERGE_SIZE * self.patch_size
        return columns * unit, rows * unit

    def sizes(
        self, sizes: Sequence[tuple[int, int]], is_target: Sequence[bool], coming: tuple[int, int] | None = None
    ) -> list[tuple[int, int]]:
        """The size of each picture of a conversation in order. coming: the size of a target picture yet to be made.

        ValueError for a context picture of which one side is more than 200 times the other.
        """
        seen = []
        for size, target in zip(reversed(sizes), reversed(is_target), strict=True):
            if target:
                coming = self.target_size(size)
            follows = target or (self.consistent_edit_scale and coming)
            seen.append(coming if follows and coming else context_size(*size, self.patch_size, self.max_pixels))
        return seen[::-1]


def channels_first(image: Image.Image) -> np.ndarray:
    """(3, H, W) uint8 of an RGB picture, in memory of its own."""
    return np.array(np.asarray(image).transpose(2, 0, 1), order="C")
