"""Scenes of coloured shapes: what is in them, in two languages, and their pictures.

A scene lives on a unit square with its origin at the top left; objects stand in the cells of a 3 x 3 grid.
"""

import math
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
TEXTURES = ("stripes", "checks", "noise", "gradient")
CELLS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
CHINESE = {
    **dict(zip(COLOURS, ("红色", "蓝色", "绿色", "黄色", "紫色", "橙色", "青色", "粉色"), strict=True)),
    **dict(zip(GROUNDS, ("白色", "黑色", "灰色", "米色"), strict=True)),
    **dict(zip(SHAPES, ("圆形", "正方形", "三角形", "十字", "星形", "圆环"), strict=True)),
    **dict(zip(CELLS, ("左上角", "上方", "右上角", "左边", "中间", "右边", "左下角", "下方", "右下角"), strict=True)),
    **dict(zip(TEXTURES, ("条纹", "棋盘格", "噪点", "渐变"), strict=True)),
    **{"large": "大", "small": "小", "plain": "纯色"},
}
SUPERSAMPLING = 4
NOISE_CELLS = 24  # the noise ground's own resolution, so that it looks alike at every picture size


@dataclass(frozen=True)
class Thing:
    """One object: its names, and the index of its cell in reading order."""

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


def draw(scene: Scene, size: int) -> Image.Image:
    """The scene as a size x size RGB picture, antialiased."""
    side = size * SUPERSAMPLING
    canvas = ground(scene, side)
    brush = ImageDraw.Draw(canvas)
    for thing in scene.things:
        outline(brush, thing, side)
    return canvas.resize((size, size), Image.Resampling.BOX)


def ground(scene: Scene, side: int) -> Image.Image:
    """The background: one colour, or that colour with a texture of a slightly different brightness."""
    colour = np.array(GROUNDS[scene.ground], dtype=np.float32)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    if scene.texture == "stripes":
        shade = (x * 8 % 1 < 0.5).astype(np.float32)
    elif scene.texture == "checks":
        shade = ((x * 6).astype(int) + (y * 6).astype(int)) % 2
    elif scene.texture == "noise":
        cells = np.random.default_rng(scene.texture_seed).random((NOISE_CELLS, NOISE_CELLS))
        shade = cells[(y * NOISE_CELLS).astype(int), (x * NOISE_CELLS).astype(int)]
    elif scene.texture == "gradient":
        shade = y
    else:
        shade = np.zeros_like(y)
    contrast = -45 if colour.mean() > 100 else 45
    pixels = colour + contrast * shade[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def outline(brush: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    """Draw one object; every shape fills its bounding box, and its centre has its colour except for the ring's."""
    (x, y), half = (value * side for value in thing.centre), SIZES[thing.size] * side
    fill = COLOURS[thing.colour]
    box = (x - half, y - half, x + half, y + half)
    if thing.shape == "circle":
        brush.ellipse(box, fill=fill)
    elif thing.shape == "ring":
        brush.ellipse(box, outline=fill, width=round(half * 0.45))
    elif thing.shape == "square":
        brush.rectangle(box, fill=fill)
    elif thing.shape == "triangle":
        brush.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=fill)
    elif thing.shape == "cross":
        arm = half * 0.36
        brush.rectangle((x - half, y - arm, x + half, y + arm), fill=fill)
        brush.rectangle((x - arm, y - half, x + arm, y + half), fill=fill)
    else:
        radii = [half if point % 2 == 0 else half * 0.45 for point in range(10)]
        angles = [math.pi * point / 5 - math.pi / 2 for point in range(10)]
        brush.polygon(
            [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)], fill=fill
        )
