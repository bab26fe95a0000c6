"""The detector reads what was drawn, under damage too, and does not see what is not there."""

import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from data.shapes.contents import ShapesConfig
from data.shapes.dataset import DEFAULTS, content_of
from data.shapes.detector import detect
from data.shapes.scenes import CELLS, COLOURS, GROUNDS, SHAPES, SIZES, TEXTURES, Scene, Thing, draw

EVERYTHING = dataclasses.replace(DEFAULTS, num_colours=8, num_shapes=6, max_objects=6, textured_fraction=0.3)
Damage = Callable[[Image.Image], Image.Image]


def noise(levels: float) -> Damage:
    generator = np.random.default_rng(0)

    def damage(picture: Image.Image) -> Image.Image:
        pixels = np.asarray(picture) + generator.normal(0, levels, (picture.height, picture.width, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    return damage


def blur(radius: float) -> Damage:
    """radius: the Gaussian's deviation in 64ths of the picture."""
    return lambda picture: picture.filter(ImageFilter.GaussianBlur(radius * picture.width / 64))


def jpeg(quality: int) -> Damage:
    def damage(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return damage


def soft(picture: Image.Image) -> Image.Image:
    """As a small decoder paints: blurred, faded and grainy."""
    faded = Image.fromarray((np.asarray(blur(1.0)(picture)) * 0.85 + 20).astype(np.uint8))
    return noise(6)(faded)


DAMAGES: dict[str, Damage] = {
    "none": lambda picture: picture,
    "noise 20": noise(20),
    "blur 1.8": blur(1.8),
    "jpeg 80": jpeg(80),
    "jpeg 50": jpeg(50),
    "soft": soft,
    "half the size": lambda picture: picture.resize((picture.width // 2,) * 2, Image.Resampling.BICUBIC),
}


def scenes(config: ShapesConfig, count: int) -> list[Scene]:
    return [content_of(config, 5, "heldout", index).scenes[0] for index in range(count)]


def errors(drawn: Iterable[Scene], size: int, damage: Damage) -> Counter[str]:
    """Objects, and what was missed, made up or misread of them; pictures, and grounds and textures misread."""
    counts: Counter[str] = Counter()
    for scene in drawn:
        seen = detect(damage(draw(scene, size)))
        truth = {thing.cell: thing for thing in scene.things}
        found = {thing.cell: thing for thing in seen.objects}
        counts["objects"] += len(truth)
        counts["pictures"] += 1
        counts["missed"] += len(truth.keys() - found.keys())
        counts["made up"] += len(found.keys() - truth.keys()) + len(seen.objects) - len(found)
        for cell in truth.keys() & found.keys():
            for key in ("shape", "colour", "size"):
                counts[key] += getattr(truth[cell], key) != getattr(found[cell], key)
        counts["ground"] += seen.ground != scene.ground
        counts["texture"] += seen.texture != scene.texture
    return counts


@pytest.mark.parametrize("damage", DAMAGES)
def test_error_rate_at_the_size_of_small_models(damage: str) -> None:
    counted = errors(scenes(EVERYTHING, 60), 64, DAMAGES[damage])
    # JPEG's coarse chroma at quality 50 blurs an orange cross of 12 pixels into its ground.
    allowed = 0.05 if damage == "jpeg 50" else 0.0
    for key in ("missed", "made up", "shape", "colour", "size"):
        assert counted[key] <= allowed * counted["objects"], counted
    assert counted["ground"] == 0, counted
    # A blur of 1.8 leaves little of grains of 2.7 pixels (8 of 60 misread), and noise of 20 levels looks like them.
    allowed = 0.15 if damage == "blur 1.8" else 0.1
    assert counted["texture"] <= allowed * counted["pictures"], counted


@pytest.mark.parametrize("damage", ["noise 20", "blur 1.8"])
def test_error_rate_at_the_size_of_targets(damage: str) -> None:
    counted = errors(scenes(EVERYTHING, 12), 252, DAMAGES[damage])
    assert sum(counted.values()) - counted["texture"] == counted["objects"] + counted["pictures"], counted


def test_every_object_on_every_ground() -> None:
    drawn = []
    for number, (shape, colour, ground) in enumerate(
        (shape, colour, ground) for shape in SHAPES for colour in COLOURS for ground in GROUNDS
    ):
        texture = ("plain", *TEXTURES)[number % 5]
        drawn.append(Scene((Thing(shape, colour, tuple(SIZES)[number % 2], number % 9),), ground, texture, number))
    counted = errors(drawn, 64, DAMAGES["none"])
    assert sum(counted.values()) == counted["objects"] + counted["pictures"], counted


def test_places_are_those_of_the_picture_whatever_its_aspect() -> None:
    thing = Thing("triangle", "purple", "small", 5)
    (found,) = detect(draw(Scene((thing,), "grey", "plain", 0), 96).resize((300, 150))).objects
    assert (found.cell, found.position) == (5, CELLS[5]) == (thing.cell, thing.truth()["position"])
    assert found.centre == pytest.approx(thing.centre, abs=0.01)
    assert found.bbox == pytest.approx(thing.truth()["bbox"], abs=0.02)
    assert found.confidence > 0.9


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("texture", ["plain", *TEXTURES])
def test_an_empty_picture_has_no_objects(ground: str, texture: str) -> None:
    seen = detect(draw(Scene((), ground, texture, 3), 64))
    assert (seen.objects, seen.ground, seen.texture, seen.unexplained) == ((), ground, texture, 0.0)


@pytest.mark.parametrize("size", [1, 64])
def test_pictures_without_a_scene_are_read_without_an_error(size: int) -> None:
    seen = detect(Image.new("RGB", (size, size), "red"))
    assert (seen.objects, seen.ground) == ((), None)
    assert detect(Image.new("L", (size, size), 128)).ground == "grey"


@pytest.mark.parametrize("ground", COLOURS)
def test_an_object_on_a_ground_of_exactly_a_palette_colour(ground: str) -> None:
    """Of that colour the ground shows no share, where 0 was divided by 0 and every pixel read as one of it."""
    colour = "blue" if ground != "blue" else "red"
    picture = Image.new("RGB", (64, 64), COLOURS[ground])
    ImageDraw.Draw(picture).rectangle((22, 22, 41, 41), fill=COLOURS[colour])
    (found,) = detect(picture).objects
    assert (found.shape, found.colour, found.cell) == ("square", colour, 4)


def test_what_is_no_shape_is_not_an_object() -> None:
    picture = draw(Scene((), "white", "plain", 0), 64)
    picture.paste(COLOURS["red"], (4, 40, 60, 46))  # a bar
    seen = detect(picture)
    assert seen.objects == () and seen.unexplained > 0.9
    picture = draw(Scene((Thing("square", "red", "large", 4),), "white", "plain", 0), 64)
    picture.paste(COLOURS["blue"], (23, 23, 32, 42))
    assert detect(picture).objects == ()  # half red, half blue


def test_the_surest_object_comes_first() -> None:
    clear, doubtful = Thing("circle", "green", "large", 0), Thing("circle", "blue", "large", 8)
    picture = draw(Scene((clear, doubtful), "white", "plain", 0), 64)
    picture.paste(GROUNDS["white"], (53, 53, 58, 64))
    seen = detect(picture)
    assert seen.objects[0].colour == "green"
    assert all(one.confidence >= other.confidence for one, other in pairwise(seen.objects))
