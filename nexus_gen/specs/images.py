"""Opening and resizing pictures: one home for the geometry that embeddings and pixels share. PIL and NumPy only."""

import math
import os
import warnings

import numpy as np
from PIL import Image, ImageOps

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import MERGE_SIZE

MAX_ASPECT = 200  # Qwen's processor refuses pictures that are longer and narrower


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """An RGB picture: EXIF rotation applied, transparency over white, 16 bits scaled, the first frame of an animation.

    Raises UserError naming the file when it is missing, no picture, cut short, or a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.seek(0)
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise UserError(f"picture {path} does not exist; check the path") from error
    # PIL's AVIF reader raises RuntimeError for damaged files.
    except (
        OSError,
        RuntimeError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise UserError(f"picture {path} cannot be read ({error}); replace it or drop its row") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; transparent parts show white."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        values = np.asarray(image, dtype=np.float32) / 65535
        return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def cover_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale until the shorter side is `size` (bilinear), then cut the centre out: size x size, aspect kept."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


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


def to_array(image: Image.Image) -> np.ndarray:
    """(3, H, W) float32 in [-1, 1]."""
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
