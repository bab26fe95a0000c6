"""In which size a picture is edited, and how the result gets the aspect of the input back. PIL only, no torch.

Sizes are (width, height) in pixels.
"""

import math
from dataclasses import dataclass
from typing import Any

from PIL import Image

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import VaeGeometry

Size = tuple[int, int]

# How a decoder that was trained on squares edits a picture of another aspect; `native` paints that aspect itself.
ASPECTS = ("stretch", "pad", "crop", "native", "square")
SIZES = ("decoder", "input")  # of a result: as many pixels as the decoder was trained at, or those of the input
OTHER_ASPECT = 0.05  # relative difference of two aspects that is reported
OTHER_AREA = 2.0  # times more or fewer pixels than a decoder was trained at, which it paints worse


@dataclass(frozen=True)
class Frame:
    """How a picture of one size is edited by a decoder that paints another.

    source: of the input. aspect: one of ASPECTS, or `given` for a requested size. painted: by the
    decoder. result: what is made of that.
    """

    source: Size
    aspect: str
    painted: Size
    result: Size

    @staticmethod
    def of(
        source: Size,
        details: dict[str, Any],
        *,
        aspect: str | None = None,
        size: str | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> "Frame":
        """details: the decoder's. aspect: one of ASPECTS; None takes what the decoder was trained for.

        size: one of SIZES, the first unless given. width, height: the size to paint, whatever the input's; a missing
        one follows its aspect. Raises UserError for what contradicts itself or does not fit the latents.
        """
        shape, trained = ratio(source), details["image_size"]
        if width or height:
            if aspect or size:
                raise UserError("--width and --height say the size of the result; leave --aspect and --size out")
            unit = latent_unit(details)
            painted = (width or multiple((height or 0) * shape, unit), height or multiple((width or 0) / shape, unit))
            require_paintable(details, *painted)
            return Frame(source, "given", painted, painted)
        aspect = aspect or details.get("aspect", ASPECTS[0])
        square = (trained, trained)
        if aspect == "square":
            if size == "input":
                raise UserError("aspect square keeps the decoder's square, not the size of the input; choose another")
            return Frame(source, aspect, square, square)
        at_size = scaled(shape, trained, 1)
        painted = scaled(shape, trained, latent_unit(details)) if aspect == "native" else square
        if size == "input":
            return Frame(source, aspect, painted, source)
        return Frame(source, aspect, painted, painted if aspect == "native" else at_size)

    @property
    def shown(self) -> Size:
        """Of the picture that `fit` makes of the input."""
        even = round(math.sqrt(math.prod(self.source)))
        side = {"stretch": even, "pad": max(self.source), "crop": min(self.source)}.get(self.aspect)
        return self.source if side is None or self._is_square else (side, side)

    def fit(self, image: Image.Image) -> Image.Image:
        """What the models are shown of the input, or of a picture of its size that goes with it.

        All but `native` and `square` show a square: a language model that was trained on squares alone reads nothing
        else well, and one that was trained on every aspect reads squares too.
        """
        if self.shown == self.source:
            return image
        if self.aspect == "stretch":
            return image.resize(self.shown, Image.Resampling.BICUBIC)
        side = self.shown[0]
        left, top = (image.width - side) // 2, (image.height - side) // 2
        if self.aspect == "crop":
            return image.crop((left, top, left + side, top + side))
        padded = Image.new("RGB", (side, side), "white")
        padded.paste(image, (-left, -top))
        return padded

    def put_back(self, painted: Image.Image, source: Image.Image) -> Image.Image:
        """The result: what was painted, in the aspect of the input. source: the input."""
        if self.aspect == "pad" and not self._is_square:
            side, (width, height) = self.shown[0], self.source
            left, top = (side - width) // 2, (side - height) // 2  # as `fit` pads
            shrink = painted.width / side
            right, bottom = (min(painted.width, end * shrink) for end in (left + width, top + height))
            middle = (left * shrink, top * shrink, right, bottom)
            return painted.resize(self.result, Image.Resampling.BICUBIC, middle)
        if self.aspect == "crop" and not self._is_square:
            around = source.resize(self.result, Image.Resampling.BICUBIC)
            side = min(self.result)
            place = ((self.result[0] - side) // 2, (self.result[1] - side) // 2)
            around.paste(painted.resize((side, side), Image.Resampling.BICUBIC), place)
            return around
        return painted if painted.size == self.result else painted.resize(self.result, Image.Resampling.BICUBIC)

    @property
    def _is_square(self) -> bool:
        return self.source[0] == self.source[1]

    def sentence(self, language: str, seen: Size) -> str:
        """What becomes of the picture, step by step; empty where nothing is resized. seen: by the language model."""
        if seen == self.painted == self.result == self.source:
            return ""
        step = self.aspect
        if step in ("stretch", "pad", "crop", "native") and (self._is_square or self.painted == self.result):
            step = "native"
        if step == "native" and self.painted != self.result:
            step = "resized"
        if step == "given" and abs(math.log(ratio(self.painted) / ratio(self.source))) > OTHER_ASPECT:
            step = "given_otherwise"
        return STEPS[language][step].format(
            source=by(self.source), seen=by(seen), painted=by(self.painted), result=by(self.result)
        )


def ratio(size: Size) -> float:
    return size[0] / size[1]


def by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"


def seen_sentence(language: str, source: Size, seen: Size) -> str:
    """What becomes of a picture that is only looked at; empty where nothing does."""
    return "" if source == seen else STEPS[language]["seen"].format(source=by(source), seen=by(seen))


def latent_unit(details: dict[str, Any]) -> int:
    """Pixels that the sides of a painted picture are multiples of: 16 for FLUX."""
    return VaeGeometry(**details["vae"]).downscale * details["transformer"]["patch_size"]


def multiple(side: float, unit: int) -> int:
    return max(1, round(side / unit)) * unit


def scaled(aspect: float, side: int, unit: int) -> Size:
    """About side * side pixels of this aspect, as multiples of the unit; the square itself for an aspect of 1."""
    short = multiple(side / math.sqrt(max(aspect, 1 / aspect)), unit)
    long = multiple(short * max(aspect, 1 / aspect), unit)
    return (long, short) if aspect >= 1 else (short, long)


def require_paintable(details: dict[str, Any], width: int, height: int) -> None:
    """Raises UserError for a size that the latent grid does not fit."""
    unit = latent_unit(details)
    if width % unit or height % unit or min(width, height) < unit:
        raise UserError(f"--width {width} and --height {height} must be multiples of {unit}")


def beyond_training(details: dict[str, Any], painted: Size) -> str:
    """A sentence about a size that the decoder was not trained at; empty for one that it is good for."""
    trained = details["image_size"]
    area = math.prod(painted) / trained**2
    native = details.get("aspect") == "native"
    if painted == (trained, trained) or (native and 1 / OTHER_AREA <= area <= OTHER_AREA):
        return ""
    taught = f"about {trained**2} pixels" if native else f"{by((trained, trained))} pixels"
    return f"{by(painted)} is painted by a decoder that was trained at {taught}; it may come out worse"


# One home for the command's words and the page's.
STEPS = {
    "en": {
        "seen": "{source} is seen at {seen}",
        "stretch": "{source} is squashed and seen at {seen}, painted at {painted} and stretched to {result}",
        "pad": "{source} is padded to a square, seen at {seen}, painted at {painted} and cut to {result}",
        "crop": "the middle of {source} is seen at {seen}, painted at {painted} and put back into {result}",
        "native": "{source} is seen at {seen} and painted at {painted}",
        "resized": "{source} is seen at {seen}, painted at {painted} and resized to {result}",
        "square": "{source} is seen at {seen} and painted as a square of {painted}, which loses its aspect",
        "given": "{source} is seen at {seen} and painted at {painted}",
        "given_otherwise": "{source} is seen at {seen} and painted at {painted}, which is another aspect",
    },
    "zh": {
        "seen": "{source} 的图片以 {seen} 查看",
        "stretch": "{source} 的图片压成正方形，以 {seen} 查看，以 {painted} 绘制，再拉伸到 {result}",
        "pad": "{source} 的图片先补成正方形，以 {seen} 查看，以 {painted} 绘制，再裁剪到 {result}",
        "crop": "{source} 的图片取其中央，以 {seen} 查看，以 {painted} 绘制，再放回 {result} 的原图中",
        "native": "{source} 的图片以 {seen} 查看，以 {painted} 绘制",
        "resized": "{source} 的图片以 {seen} 查看，以 {painted} 绘制，再缩放到 {result}",
        "square": "{source} 的图片以 {seen} 查看，绘制为 {painted} 的正方形，宽高比会改变",
        "given": "{source} 的图片以 {seen} 查看，以 {painted} 绘制",
        "given_otherwise": "{source} 的图片以 {seen} 查看，以 {painted} 绘制，宽高比会改变",
    },
}
