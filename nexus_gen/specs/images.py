"""Opening and resizing pictures: one home for the geometry that embeddings and pixels share. PIL and NumPy only."""

import os
import warnings

import numpy as np
from PIL import Image, ImageOps

from nexus_gen.specs.errors import UserError


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


def to_array(image: Image.Image) -> np.ndarray:
    """(3, H, W) float32 in [-1, 1]."""
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
