"""Pictures of every kind become RGB, and what is no picture is named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nexus_gen.pictures.images import (
    PictureSizing,
    channels_first,
    context_size,
    cover_crop,
    open_image,
    open_size,
    squash,
)
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import target_grids, tokens_per_side


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    if mode == "I;16":
        Image.fromarray(np.full((4, 6), 65535, dtype=np.uint16)).save(path)
    else:
        Image.new("RGB", (6, 4), "white").convert(mode).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert np.asarray(image).min() >= 250


def test_transparency_shows_white_and_orientation_is_applied(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == open_size(tmp_path / "turned.jpg") == (4, 6)
    assert open_size(tmp_path / "clear.png") == (4, 4)


def test_sixteen_bits_and_masks_keep_their_greys(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(open_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 128, 255]
    mask = Image.new("LA", (2, 1), (0, 255))
    mask.putpixel((1, 0), (0, 127))
    mask.save(tmp_path / "mask.png")
    assert np.asarray(open_image(tmp_path / "mask.png"))[0, :, 0].tolist() == [0, 128]


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_what_is_no_picture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match=r"text\.png cannot be read"):
        open_image(tmp_path / "text.png")
    with pytest.raises(UserError, match=r"gone\.png does not exist"):
        open_image(tmp_path / "gone.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"bomb\.png cannot be read"):
        open_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "gif", "avif"])
def test_a_damaged_picture_is_named(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"broken.{extension}"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"broken\.{extension} cannot be read"):
        open_image(path)


def test_an_avif_picture_whose_data_is_noise_is_named(tmp_path: Path) -> None:
    path = tmp_path / "noise.avif"
    Image.new("RGB", (40, 40), "red").save(path)
    head, tag, data = path.read_bytes().partition(b"mdat")
    path.write_bytes(head + tag + bytes(byte ^ 0xFF for byte in data))
    with pytest.raises(UserError, match=r"noise\.avif cannot be read"):
        open_image(path)


def test_geometry() -> None:
    image = Image.new("RGB", (200, 100), "black")
    image.paste("white", (40, 0, 160, 100))
    assert np.asarray(cover_crop(image, 50)).min() == 255  # the centre alone
    assert np.asarray(squash(image, 50))[:, :5].max() < 30
    image.putpixel((7, 3), (1, 2, 3))
    array = channels_first(image)
    assert (array.shape, array.dtype, array.flags.writeable) == ((3, 100, 200), np.uint8, True)
    assert array[:, 3, 7].tolist() == [1, 2, 3] and array[:, 50, 100].tolist() == [255] * 3


def test_targets_take_the_grid_whose_aspect_is_nearest() -> None:
    square, dynamic = PictureSizing(14, 262640), PictureSizing(14, 262640, dynamic_targets=True)
    expected = {(512, 512): (9, 9), (640, 480): (10, 8), (480, 640): (8, 10), (1500, 1000): (11, 7), (90, 160): (6, 12)}
    for size, (columns, rows) in {**expected, (9000, 10): (12, 6)}.items():
        assert dynamic.target_size(size) == (28 * columns, 28 * rows), size
        assert square.target_size(size) == (252, 252)
    assert target_grids(81) == ((9, 9), (8, 10), (10, 8), (7, 11), (11, 7), (6, 12), (12, 6))


@pytest.mark.parametrize("num_tokens", [1, 4, 25, 49, 81, 324])
def test_targets_of_any_square_of_tokens(num_tokens: int) -> None:
    grids = target_grids(num_tokens)
    assert grids[0] == (tokens_per_side(num_tokens),) * 2 and len(set(grids)) == len(grids)
    assert all(rows * columns <= num_tokens and max(rows, columns) <= 2 * min(rows, columns) for rows, columns in grids)
    assert {grid[::-1] for grid in grids} == set(grids)
    sizing = PictureSizing(14, 262640, num_target_tokens=num_tokens)
    assert sizing.target_size((1000, 300)) == (28 * num_tokens**0.5,) * 2


@pytest.mark.parametrize(("num_tokens", "near"), [(80, "64 and 81"), (0, "1"), (-4, "1"), (82, "81 and 100")])
def test_targets_are_squares(num_tokens: int, near: str) -> None:
    with pytest.raises(ValueError, match=f"{num_tokens} tokens is no square of them; {near} would do"):
        tokens_per_side(num_tokens)


def test_an_edit_is_seen_in_the_scale_of_its_result() -> None:
    sizes, is_target = [(640, 480), (480, 640), (640, 480), (200, 100)], [False, False, True, False]
    plain = PictureSizing(14, 262640).sizes(sizes, is_target)
    assert plain == [(588, 420), (420, 588), (252, 252), (196, 112)]
    consistent = PictureSizing(14, 262640, consistent_edit_scale=True)
    assert consistent.sizes(sizes, is_target) == [(252, 252)] * 3 + [(196, 112)]  # nothing is made behind the last
    both = PictureSizing(14, 262640, dynamic_targets=True, consistent_edit_scale=True)
    assert both.sizes(sizes, is_target) == [(280, 224)] * 3 + [(196, 112)]
    assert consistent.sizes(sizes[:1], [False], coming=(252, 252)) == [(252, 252)]
    with pytest.raises(ValueError, match="200 times"):
        both.sizes([(6000, 20)], [False])


@pytest.mark.parametrize(("patch_size", "max_pixels"), [(14, 262640), (14, 28 * 28 * 4), (6, 5184), (16, 10**6)])
def test_context_pictures_get_the_size_that_qwen_gives_them(patch_size: int, max_pixels: int) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    unit = 2 * patch_size
    generator = np.random.default_rng(0)
    sizes = [
        (1, 1),
        (200, 1),
        (14, 2800),
        (4000, 3000),
        *np.exp(generator.uniform(0, 9, (2000, 2))).astype(int).tolist(),
    ]
    for width, height in sizes:
        if max(width, height) > 200 * min(width, height):
            with pytest.raises(ValueError, match="200 times"):
                context_size(width, height, patch_size, max_pixels)
        else:
            theirs = smart_resize(height, width, unit, min_pixels=4 * unit**2, max_pixels=max_pixels)
            assert context_size(width, height, patch_size, max_pixels) == theirs[::-1], (width, height)
