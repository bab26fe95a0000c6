"""Scenes of coloured shapes: what is in them, in two languages, and their pictures.

A scene lives on a unit square with its origin at the top left; objects stand in the cells of a 3 x 3 grid.
"""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "blue": (40, 80, 220),
    "green": (40, 160, 70),
    "yellow": (245, 205, 40),
    "purple": (140, 60, 190),
    "orange": (245, 130, 30),
    "cyan": (40, 195, 215),
    "pink": (245, 130, 185),
}
GROUNDS = {"white": (250, 250, 250), "black": (15, 15, 15), "grey": (150, 150, 150), "beige": (225, 210, 180)}
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
SIZES = {"large": 0.15, "small": 0.095}  # half extent of an object
TEXTURES = ("striped", "checked", "noisy", "gradient")
CELLS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
CHINESE = {
    **dict(zip(COLOURS, ("红色", "蓝色", "绿色", "黄色", "紫色", "橙色", "青色", "粉色"), strict=True)),
    **dict(zip(GROUNDS, ("白色", "黑色", "灰色", "米色"), strict=True)),
    **dict(zip(SHAPES, ("圆形", "正方形", "三角形", "十字", "星形", "圆环"), strict=True)),
    **dict(zip(CELLS, ("左上角", "上方", "右上角", "左边", "中间", "右边", "左下角", "下方", "右下角"), strict=True)),
    **dict(zip(TEXTURES, ("条纹", "棋盘格", "噪点", "渐变"), strict=True)),
    **{"large": "大", "small": "小"},
}
# Names that no row uses unless asked to: something to teach to a model that knows the usual ones.
NEW_NAMES = {
    "en": {
        **dict(
            zip(COLOURS, ("scarlet", "azure", "emerald", "golden", "violet", "tangerine", "teal", "rose"), strict=True)
        ),
        **dict(zip(SHAPES, ("disc", "tile", "wedge", "plus", "spark", "loop"), strict=True)),
    },
    "zh": {
        **dict(zip(COLOURS, ("朱红", "蔚蓝", "翠绿", "金黄", "紫罗兰", "橘色", "碧色", "玫红"), strict=True)),
        **dict(zip(SHAPES, ("圆盘", "方块", "楔形", "加号", "火花", "圆圈"), strict=True)),
    },
}
SUPERSAMPLING = 4
TEXTURE_CONTRAST = 45  # brightness levels, away from the ground's own
NOISE_CELLS = 24  # the noise ground's own resolution, so that it looks alike at every picture size


@dataclass(frozen=True)
class Thing:
    """One object: the names of its shape, colour and size, and the index of its cell in reading order."""

    shape: str
    colour: str
    size: str
    cell: int

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in [0, 1]."""
        return (self.cell % 3 + 0.5) / 3, (self.cell // 3 + 0.5) / 3

    def truth(self) -> dict[str, Any]:
        """What a scorer compares with; lengths in units of the picture."""
        (x, y), half = self.centre, SIZES[self.size]
        return {
            **asdict(self),
            "position": CELLS[self.cell],
            "centre": [x, y],
            "bbox": [x - half, y - half, x + half, y + half],
        }


@dataclass(frozen=True)
class Scene:
    """Objects in distinct cells on a ground; texture_seed decides the noise of a textured one."""

    things: tuple[Thing, ...]
    ground: str
    texture: str
    texture_seed: int

    def truth(self) -> dict[str, Any]:
        return {"objects": [thing.truth() for thing in self.things], "ground": self.ground, "texture": self.texture}


def name(word: str, language: str) -> str:
    """A colour, shape, cell, size or texture in a language."""
    return CHINESE[word] if language == "zh" else word


def renamed(text: str, language: str) -> str:
    """A text of ours with the new names of colours and shapes."""
    new = {name(word, language): other for word, other in NEW_NAMES[language].items()}
    if language == "zh":
        return re.sub("|".join(new), lambda found: new[found[0]], text)
    text = re.sub(rf"\b({'|'.join(new)})(?=(s|es)?\b)", lambda found: new[found[0]], text)
    return re.sub(r"\ban? (?=(\w))", lambda found: "an " if found[1] in "aeiou" else "a ", text)


def draw(scene: Scene, size: int) -> Image.Image:
    """The scene as a size x size RGB picture; the edges of objects are antialiased."""
    picture = draw_ground(scene, size)
    for thing in scene.things:
        (x, y), half = (value * size for value in thing.centre), SIZES[thing.size] * size
        left, top = math.floor(x - half), math.floor(y - half)
        side = math.ceil(max(x + half - left, y + half - top))
        mask = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
        draw_outline(
            ImageDraw.Draw(mask),
            thing.shape,
            (x - left) * SUPERSAMPLING,
            (y - top) * SUPERSAMPLING,
            half * SUPERSAMPLING,
        )
        picture.paste(COLOURS[thing.colour], (left, top), mask.reduce(SUPERSAMPLING))
    return picture


def draw_ground(scene: Scene, size: int) -> Image.Image:
    """The background: one colour, or that colour with a texture of another brightness.

    A texture is a small array of shades in [0, 1], enlarged without smoothing.
    """
    colour = GROUNDS[scene.ground]
    if scene.texture == "plain":
        return Image.new("RGB", (size, size), colour)
    shades: np.ndarray
    if scene.texture == "striped":
        shades = np.arange(16)[None] % 2
    elif scene.texture == "checked":
        shades = np.add.outer(np.arange(6), np.arange(6)) % 2
    elif scene.texture == "noisy":
        shades = np.random.default_rng(scene.texture_seed).random((NOISE_CELLS, NOISE_CELLS))
    else:
        shades = np.linspace(0, 1, size)[:, None]
    contrast = -TEXTURE_CONTRAST if np.mean(colour) > 100 else TEXTURE_CONTRAST
    pixels = np.array(colour) + contrast * shades[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)


def draw_outline(brush: ImageDraw.ImageDraw, shape: str, x: float, y: float, half: float) -> None:
    """Fill a shape in white: it reaches `half` from (x, y) to every side; all but the ring cover (x, y)."""
    box = (x - half, y - half, x + half, y + half)
    if shape == "circle":
        brush.ellipse(box, fill=255)
    elif shape == "ring":
        brush.ellipse(box, outline=255, width=round(half * 0.45))
    elif shape == "square":
        brush.rectangle(box, fill=255)
    elif shape == "triangle":
        brush.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=255)
    elif shape == "cross":
        arm = half * 0.36
        brush.rectangle((x - half, y - arm, x + half, y + arm), fill=255)
        brush.rectangle((x - arm, y - half, x + arm, y + half), fill=255)
    else:
        brush.polygon([(x + half * across, y + half * down) for across, down in STAR], fill=255)


def star_points() -> list[tuple[float, float]]:
    """A five-pointed star, stretched to fill [-1, 1] x [-1, 1]."""
    angles = [math.pi * point / 5 for point in range(10)]
    radii = [1.0, 0.45] * 5
    lowest = math.cos(math.pi / 5)
    return [
        (r * math.sin(a) / math.sin(2 * math.pi / 5), 2 * (1 - r * math.cos(a)) / (1 + lowest) - 1)
        for r, a in zip(radii, angles, strict=True)
    ]


STAR = star_points()
