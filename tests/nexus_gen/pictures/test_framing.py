"""What is not square is edited and comes back in its aspect; every size on the way is said."""

import string
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nexus_gen.artifacts.artifact import Manifest
from nexus_gen.parts.models import DECODER_KINDS, RELEASED, SHIPPED_RUN
from nexus_gen.pictures.framing import ASPECTS, STEPS, Frame, beyond_training, seen_sentence
from nexus_gen.specs.errors import UserError

SHIPPED = Manifest.load(SHIPPED_RUN / "editing_decoder" / "artifact").details  # squares of 72, multiples of 8
FLUX = RELEASED["editing_decoder"]  # about 512 * 512 pixels, multiples of 16
INPUTS = [(500, 333), (333, 500), (4000, 1000), (101, 100), (73, 72), (3, 900), (1920, 1080)]


@pytest.mark.parametrize("details", [SHIPPED, FLUX])
@pytest.mark.parametrize("source", INPUTS)
def test_results_have_the_aspect_and_the_pixels_that_are_stated(
    details: dict[str, Any], source: tuple[int, int]
) -> None:
    for aspect in (None, *ASPECTS):
        frame = Frame.of(source, details, aspect=aspect)
        width, height = frame.result
        if frame.aspect == "square":
            assert frame.result == frame.painted == (details["image_size"],) * 2
            continue
        if frame.aspect == "native":
            unit = 16 if details is FLUX else 8
            assert frame.result == frame.painted and width % unit == height % unit == 0
        else:
            assert frame.painted == (details["image_size"],) * 2
        if min(source) > 3:
            slack = 0.2 if frame.aspect == "native" and details is SHIPPED else 0.05
            assert abs(width / height / (source[0] / source[1]) - 1) < slack, (aspect, frame)
            assert 0.7 < width * height / details["image_size"] ** 2 < 1.4
        if frame.aspect != "square":
            assert Frame.of(source, details, aspect=aspect, size="input").result == source


def test_decoders_are_used_as_they_were_trained() -> None:
    assert Frame.of((500, 333), SHIPPED) == Frame((500, 333), "stretch", (72, 72), (89, 59))
    assert Frame.of((500, 333), {**SHIPPED, "aspect": "crop"}).aspect == "crop"
    for kind in DECODER_KINDS:
        assert Frame.of((500, 333), RELEASED[kind]) == Frame((500, 333), "native", (624, 416), (624, 416))
    for aspect in (None, *ASPECTS):  # squares are painted as ever
        frame = Frame.of((200, 200), SHIPPED, aspect=aspect)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 72, 3), dtype=np.uint8))
        assert (frame.painted, frame.result, frame.shown) == ((72, 72), (72, 72), (200, 200))
        assert frame.fit(image) is image and frame.put_back(image, image) is image


def picture(width: int, height: int) -> Image.Image:
    """Smooth enough to survive resizing; every part has a colour of its own."""
    down, across = np.mgrid[0:height, 0:width].astype(float)
    channels = [255 * across / width, 255 * down / height, 255 * (across / width - down / height) ** 2]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize("aspect", ["stretch", "pad", "crop"])
@pytest.mark.parametrize("size", ["decoder", "input"])
@pytest.mark.parametrize("source", [(300, 200), (200, 300), (301, 100)])
def test_what_changes_nothing_gives_the_input_back(aspect: str, size: str, source: tuple[int, int]) -> None:
    """A decoder that paints exactly what it is shown: the result is the input, wherever its parts went on the way."""
    details, image = {**SHIPPED, "image_size": 256}, picture(*source)
    frame = Frame.of(source, details, aspect=aspect, size=size)
    shown = frame.fit(image)
    assert shown.size == frame.shown and shown.width == shown.height
    result = frame.put_back(shown.resize(frame.painted, Image.Resampling.BICUBIC), image)
    expected = np.asarray(image.resize(frame.result, Image.Resampling.BICUBIC), dtype=float)
    difference = np.abs(np.asarray(result, dtype=float) - expected)[5:-5, 5:-5]  # white margins bleed into the rim
    assert result.size == frame.result and difference.max() < 12 and difference.mean() < 1.5


def test_crop_leaves_what_is_beside_the_middle() -> None:
    image, frame = picture(300, 200), Frame.of((300, 200), SHIPPED, aspect="crop", size="input")
    result = np.asarray(frame.put_back(Image.new("RGB", (72, 72), "red"), image))
    assert (result[:, 50:250] == (255, 0, 0)).all()
    assert np.array_equal(result[:, :50], np.asarray(image)[:, :50])
    assert np.array_equal(result[:, 250:], np.asarray(image)[:, 250:])


def test_a_size_that_is_given_is_painted() -> None:
    assert Frame.of((500, 333), SHIPPED, width=96, height=64).result == (96, 64)
    assert Frame.of((500, 333), SHIPPED, width=96).result == (96, 64)  # the other side follows the aspect
    assert Frame.of((500, 333), SHIPPED, height=96).result == (144, 96)
    assert "which is another aspect" in Frame.of((500, 333), SHIPPED, width=96, height=96).sentence("en", (84, 60))
    assert "aspect" not in Frame.of((500, 333), SHIPPED, width=96, height=64).sentence("en", (84, 60))
    for wrong, message in (
        ({"width": 90, "height": 64}, "--width 90 and --height 64 must be multiples of 8"),
        ({"width": 96, "aspect": "pad"}, "leave --aspect and --size out"),
        ({"height": 96, "size": "input"}, "leave --aspect and --size out"),
        ({"aspect": "square", "size": "input"}, "not the size of the input"),
    ):
        with pytest.raises(UserError, match=message):
            Frame.of((500, 333), SHIPPED, **wrong)


def test_sizes_that_a_decoder_was_not_trained_at_are_reported() -> None:
    assert not beyond_training(SHIPPED, (72, 72)) and not beyond_training(FLUX, (512, 512))
    assert not beyond_training(FLUX, (624, 416)) and not beyond_training(FLUX, (320, 704))
    assert "144 x 96 is painted by a decoder that was trained at 72 x 72" in beyond_training(SHIPPED, (144, 96))
    assert "2048 x 2048" in beyond_training(FLUX, (2048, 2048)) and "64 x 64" in beyond_training(FLUX, (64, 64))


def test_every_step_is_said_in_both_languages() -> None:
    def names(text: str) -> set[str | None]:
        return {name for _, name, _, _ in string.Formatter().parse(text)} - {None}

    assert {step: names(text) for step, text in STEPS["en"].items()} == {
        step: names(text) for step, text in STEPS["zh"].items()
    }
    said = Frame.of((500, 333), SHIPPED).sentence("en", (72, 72))
    assert said == "500 x 333 is squashed and seen at 72 x 72, painted at 72 x 72 and stretched to 89 x 59"
    for aspect in ASPECTS:
        frame = Frame.of((500, 333), SHIPPED, aspect=aspect)
        for language in STEPS:
            assert all(f"{side}" in frame.sentence(language, (84, 60)) for side in (500, 333, 84, *frame.result))
    assert Frame.of((72, 72), SHIPPED).sentence("en", (72, 72)) == ""
    assert seen_sentence("en", (4000, 3000), (588, 420)) == "4000 x 3000 is seen at 588 x 420"
    assert seen_sentence("en", (84, 60), (84, 60)) == ""
